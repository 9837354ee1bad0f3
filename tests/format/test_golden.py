"""Caches that this version and earlier ones wrote are read for ever, and this version still writes the same."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from logitcache.store import open_cache, verify
from logitcache.store.schema import FORMAT_VERSION
from tests.format.check import check_contents
from tests.format.reader import Contents, read_cache
from tests.golden.make import FINISHED, MASKED, SELECTIONS, content, make
from tests.store.caches import files_of

GOLDEN = Path(__file__).parents[1] / "golden"
CACHES = sorted(path for path in GOLDEN.glob("v*/*") if path.is_dir())


def expected_of(cache: Path) -> Contents:
    return Contents(**json.loads(cache.with_suffix(".json").read_text()))


@pytest.mark.parametrize("cache", CACHES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_golden_caches_are_read(cache: Path) -> None:
    """By `open_cache` as by the independent reader; and `verify` finds nothing."""
    expected = vars(expected_of(cache))
    opened = open_cache(cache, partial=True)
    check_contents(Contents(**content(opened)), expected)
    check_contents(read_cache(cache), expected)
    report = verify(cache)
    assert report.ok, report.problems
    assert report.tokens == len(expected["tokens"]) > 0
    assert report.unfinished == cache.name.startswith("unfinished")
    held = [opened.manifest.identity.geometry.block_tokens(ref.first_block, ref.first_block + ref.num_blocks)
            for ref in opened.chunks]  # fmt: skip
    assert report.tokens == sum(map(sum, held))


def test_what_the_golden_caches_cover() -> None:
    """Every selection, coding and layout, both containers, masks, a short block, a missing unit."""
    caches = [open_cache(cache, partial=True) for cache in CACHES]
    identities = [cache.manifest.identity for cache in caches]
    assert {(one.selection.method, one.selection.exponent) for one in identities} == {
        (fields["method"], fields.get("exponent")) for fields in SELECTIONS.values()
    }
    for kind in ("zarr", "arrow"):
        chosen = [one.codec for one in identities if one.container == kind]
        assert {one["values"] for one in chosen} == {"counts", "probabilities", "weights", "head-tail", "none"}
        assert any("masked" in one for one in chosen)
        assert {one["layout"] for one in chosen} == {"small", "fast"}
    assert any(one.geometry.short_blocks and one.ancestry for one in identities)
    assert any(not cache.manifest.complete for cache in caches)
    assert len(caches) >= len(FINISHED) + len(MASKED) + 2
    assert (GOLDEN / f"v{FORMAT_VERSION}").is_dir()


def test_this_version_writes_the_same_bytes(tmp_path: Path) -> None:
    lines = re.findall(r"^\| ([a-z]+) \| ([0-9.]+) \|$", (GOLDEN / "README.md").read_text(), re.MULTILINE)
    assert {name for name, _ in lines} == {"numpy", "zarr", "numcodecs", "pcodec", "pyarrow"}
    others = [f"{name} {version(name)}" for name, recorded in lines if version(name) != recorded]
    if others:
        pytest.skip(f"the golden caches were written with other versions than {', '.join(others)}")
    make(tmp_path / "made")
    made, golden = files_of(tmp_path / "made"), files_of(GOLDEN / f"v{FORMAT_VERSION}")
    assert sorted(made) == sorted(golden)
    assert [name for name, data in golden.items() if made[name] != data] == []


def test_git_leaves_the_golden_caches_alone() -> None:
    """A changed line ending would be damage: .gitattributes says that they are binary."""
    root = GOLDEN.parents[1]
    rules = (root / ".gitattributes").read_text()
    assert "tests/golden/v*/** binary" in rules.splitlines()
    if (root / ".git").exists():
        path = "tests/golden/v1/top-k-small-zarr/plan.json"
        shown = subprocess.run(
            ["git", "check-attr", "text", path], cwd=root, capture_output=True, text=True, check=True
        )
        assert shown.stdout.strip() == f"{path}: text: unset"
