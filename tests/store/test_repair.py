"""`repair`: whatever is damaged or missing is found, taken back, and made again as the same bytes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from logitcache.errors import CacheError, FormatVersionError
from logitcache.store import CacheWriter, repair, verify
from logitcache.store.layout import Layout
from tests.faults import flip_bit
from tests.store.caches import commit, content, files_of, identity, make_cache, rewrite


def shard_of(root: Path, unit: int) -> Path:
    return sorted((root / "shards").iterdir())[unit]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def swap(root: Path) -> None:
    one, two = shard_of(root, 0), shard_of(root, 2)
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], None], list[int | None], str]] = {
    "bit of a shard": (
        lambda root: flip_bit(shard_of(root, 1), 5000),
        [1],
        r"000001-.*zip is damaged: its content differs from its commit record$",
    ),
    "shard cut off": (lambda root: cut(shard_of(root, 2)), [2], r"its content differs from its commit record$"),
    "shard missing": (lambda root: shard_of(root, 0).unlink(), [0], r"000000-.*zip is missing$"),
    "two shards swapped": (swap, [0, 2], r"its content differs from its commit record$"),
    "bit of a commit": (
        lambda root: flip_bit(root / "commits" / "000001.json", 900),
        [1],
        r"000001.json is damaged: its content differs from its checksum; restore the file$",
    ),
    "commit missing": (lambda root: (root / "commits" / "000002.json").unlink(), [2], r"000002.json is missing$"),
    "commit of another unit": (
        lambda root: shutil.copy(root / "commits" / "000001.json", root / "commits" / "000002.json"),  # type: ignore[func-returns-value]
        [2],
        r"000002.json belongs to another cache or unit; restore the right file$",
    ),
    "tables": (lambda root: flip_bit(Layout(root).codebook, 3000), [0], r"tables.zarr.zip"),
    "tables missing": (lambda root: Layout(root).codebook.unlink(), [0], r"tables.zarr.zip is missing$"),
    "manifest": (lambda root: flip_bit(root / "manifest.json", 900), [None], r"manifest.json is damaged"),
    "plan": (lambda root: flip_bit(root / "plan.json", 900), [None], r"plan.json is damaged"),
    "plan missing": (lambda root: (root / "plan.json").unlink(), [None], r"plan.json cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_made_good(tmp_path: Path, case: str) -> None:
    """Listing changes nothing; after taking back, what made the cache makes the same bytes again."""
    damage, units, what = DAMAGE[case]
    root = make_cache(tmp_path / "cache").root
    before = files_of(root)
    damage(root)
    assert not verify(root).ok
    damaged = files_of(root)
    listed = repair(root)
    assert [item.unit for item in listed] == units

    assert all(re.search(what, item.what) for item in listed)
    assert files_of(root) == damaged
    assert repair(root, apply=True) == listed
    assert not (root / "manifest.json").exists()
    pending = CacheWriter.open(root, identity()).pending_units()
    assert pending == [unit for unit in units if unit is not None]
    make_cache(root)
    assert files_of(root) == before
    assert repair(root) == []


def test_a_whole_cache(tmp_path: Path) -> None:
    for units in (range(3), range(2)):
        root = make_cache(tmp_path / str(units), units=units).root
        before = files_of(root)
        assert repair(root, apply=True) == []
        assert files_of(root) == before


def test_units_with_other_tables(tmp_path: Path) -> None:
    """As when tables were counted again and came out otherwise: what does not fit them is taken back."""
    root = make_cache(tmp_path / "cache").root
    for unit in (1, 2):
        rewrite(root / "commits" / f"{unit:06d}.json", codebook_sha256="1" * 64)
    (root / "manifest.json").unlink()
    assert [item.unit for item in repair(root)] == [1, 2]
    assert all("was encoded with other tables than those of" in item.what for item in repair(root))


def test_an_unfinished_repair_is_finished(tmp_path: Path) -> None:
    """Killed between the commits and the tables: the tables are still found, and their unit is pending."""
    root = make_cache(tmp_path / "cache").root
    before = files_of(root)
    flip_bit(Layout(root).codebook, 3000)
    for name in ("manifest.json", "commits/000000.json"):
        (root / name).unlink()
    assert [item.unit for item in repair(root, apply=True)] == [0]
    make_cache(root)
    assert files_of(root) == before


def test_a_cache_that_somebody_writes(tmp_path: Path) -> None:
    tokens, targets = content()
    writer = CacheWriter.open(tmp_path / "cache", identity())
    commit(writer, 0, tokens, targets)
    shard_of(tmp_path / "cache", 0).unlink()
    before = files_of(tmp_path / "cache")
    assert [item.unit for item in repair(tmp_path / "cache")] == [0]
    with pytest.raises(CacheError, match=r"is being written; wait until that run ends, then try again$"):
        repair(tmp_path / "cache", apply=True)
    assert files_of(tmp_path / "cache") == before


def test_what_cannot_be_repaired(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"is not a logitcache cache: it holds no plan.json and no manifest.json"):
        repair(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(CacheError, match=r"has neither a plan nor a manifest that can be read \(.*\); restore plan"):
        repair(tmp_path)
    (tmp_path / "plan.json").unlink()
    root = make_cache(tmp_path / "cache").root
    rewrite(root / "manifest.json", format_version=2)
    with pytest.raises(FormatVersionError, match=r"upgrade logitcache$"):
        repair(root)
