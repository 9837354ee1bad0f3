"""A reader written from FORMAT.md alone reads what `open_cache` reads, and refuses what FORMAT.md refuses."""

from __future__ import annotations

import ast
import itertools
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from logitcache.codec import LayoutName
from logitcache.store import open_cache
from logitcache.store.layout import ContainerKind
from tests.format.check import check_cache
from tests.format.files import crc32c
from tests.format.reader import Contents, FormatError, read_cache
from tests.golden.make import SELECTIONS, write
from tests.golden.rows import mask_of
from tests.store.caches import make_cache
from tests.store.caches import rewrite as rewrite_document

# Short blocks, one of a single token, in and between chunks; a last block of one token.
SHORT_BLOCKS = [7, 3, 7, 1, 6, 7, 7, 1]
LAYOUTS: list[LayoutName] = ["small", "fast"]
CONTAINERS: list[ContainerKind] = ["zarr", "arrow"]
FORMS = {
    "-".join(form): form
    for form in itertools.product(["sample", "top-k", "sample-exponent", "varopt", "label"], LAYOUTS, CONTAINERS)
}
MASKED_FORMS = {
    "-".join(form): form for form in itertools.product(["sample", "top-k", "varopt", "label"], LAYOUTS, CONTAINERS)
}


@pytest.fixture(scope="module", params=FORMS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name, layout, container = FORMS[request.param]
    root = tmp_path_factory.mktemp("cache") / request.param
    write(root, name, layout, container, SHORT_BLOCKS, seed=5, unit_blocks=5)
    return name, root


def test_both_readers_read_the_same(made: tuple[str, Path]) -> None:
    name, root = made
    found = check_cache(root)
    blocks = open_cache(root).read_blocks(0, len(SHORT_BLOCKS))
    assert blocks.valid.sum(1).tolist() == SHORT_BLOCKS
    assert found.tokens == blocks.tokens[blocks.valid].tolist()
    assert found.ids == [row.tolist() for row in _rows(blocks.targets.ids, blocks.targets.offsets, blocks.valid)]
    _check_that_special_rows_occur(found, SELECTIONS[name]["method"], name == "sample")
    if name == "varopt":
        cache = open_cache(root)
        assert {int(number) for ref in cache.chunks for number in cache.read_planes(ref)["precision"]} > {0}


@pytest.mark.parametrize("form", MASKED_FORMS)
def test_masked_caches(form: str, tmp_path: Path) -> None:
    """Both readers read the same, rows only where they count, and labels only there; one chunk has no such row."""
    name, layout, container = MASKED_FORMS[form]
    plain, masked = tmp_path / "plain", tmp_path / "masked"
    write(plain, name, layout, container, SHORT_BLOCKS, seed=5, unit_blocks=5)
    write(masked, name, layout, container, SHORT_BLOCKS, seed=5, unit_blocks=5, masked=True)
    found = check_cache(masked)
    everything = check_cache(plain)
    counted = mask_of(SHORT_BLOCKS, 5)
    assert found.counted == counted.astype(int).tolist()
    assert 0 < sum(found.counted) < len(found.counted)
    assert found.ids == [ids if kept else [] for ids, kept in zip(everything.ids, counted, strict=True)]
    np.testing.assert_array_equal(np.array(found.label_logprob)[counted], np.array(everything.label_logprob)[counted])
    assert np.isnan(np.array(found.label_logprob)[~counted]).all()
    # Others are rounded at random, or scaled to a sum that is taken over all rows.
    if name == "sample":
        assert [row for row, kept in zip(found.weights, counted, strict=True) if kept] == [
            row for row, kept in zip(everything.weights, counted, strict=True) if kept
        ]
    cache = open_cache(masked)
    blocks = cache.read_blocks(0, len(SHORT_BLOCKS))
    assert blocks.counted is not None
    np.testing.assert_array_equal(blocks.counted[blocks.valid], counted)
    labels = open_cache(plain).read_blocks(0, len(SHORT_BLOCKS)).labels()
    np.testing.assert_array_equal(blocks.labels(), np.where(blocks.counted, labels, -100))
    assert cache.num_counted == counted.sum() == (blocks.labels() >= 0).sum()
    assert cache.snapshot(1).num_counted == counted[: sum(SHORT_BLOCKS[:5])].sum()


def _rows(values: np.ndarray, offsets: np.ndarray, valid: np.ndarray) -> list[np.ndarray]:
    rows = np.split(values, offsets[1:-1])
    return [rows[number] for number in np.flatnonzero(valid)]


def _check_that_special_rows_occur(found: Contents, method: str, counts: bool) -> None:
    """Otherwise the comparison would say nothing of them."""
    assert counts or [] in found.ids
    assert not found.counted
    assert np.isnan(found.label_logprob).any() and np.isneginf(found.label_logprob).any()  # noqa: PT018
    assert np.isnan(found.entropy).any()
    if method == "top-k":
        assert {0, 1} < set(found.tail_mass)
        assert any(ids and tail == 1 for ids, tail in zip(found.ids, found.tail_mass, strict=True))
    if method == "varopt":
        heads = [sum(weight > tau for weight in row) for row, tau in zip(found.weights, found.threshold, strict=True)]
        assert {0, 1, 4} < set(heads)


@pytest.mark.parametrize(("kind", "container"), list(itertools.product(["counts", "logprob"], CONTAINERS)))
def test_random_rows(kind: str, container: ContainerKind, tmp_path: Path) -> None:
    """Rows of the store's tests: spiky and flat, of 400 ids, the widest columns."""
    check_cache(make_cache(tmp_path / "cache", kind, container=container).root)


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_unfinished_cache(container: ContainerKind, tmp_path: Path) -> None:
    found = check_cache(make_cache(tmp_path / "cache", units=range(1, 2), container=container).root)
    assert set(found.blocks) == set(range(8, 16))


@pytest.mark.parametrize("module", ["files", "reader"])
def test_the_reader_is_independent(module: str) -> None:
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    foreign = {str(name) for name in names} - set(sys.stdlib_module_names)
    assert foreign <= {"numpy", "pcodec", "pyarrow", "tests.format.files"}


def test_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283


# ---------------------------------------------------------------------------------------------- refusals


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def _shard(root: Path) -> Path:
    return min((root / "shards").iterdir())


def _add_member(root: Path) -> None:
    with zipfile.ZipFile(_shard(root), "a") as archive:
        archive.writestr("more", b"")


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a bit of a shard": ("another hash", lambda root: _flip(_shard(root))),
    "the end of a shard": ("another size", lambda root: _shard(root).write_bytes(_shard(root).read_bytes()[:-1])),
    "a member more": ("another size", _add_member),
    "a bit of the codebook": ("another hash", lambda root: _flip(next((root / "codebook").iterdir()))),
    "a field of the manifest": (
        "differs from its checksum",
        lambda root: (root / "manifest.json").write_text(
            (root / "manifest.json").read_text().replace('"seed": 0', '"seed": 1')
        ),
    ),
    "the manifest's meaning": (
        "the fingerprint differs",
        lambda root: rewrite_document(root / "manifest.json", codebook_sha256="0" * 64),
    ),
    "an unknown field": ("has other fields", lambda root: rewrite_document(root / "manifest.json", more=1)),
    "a newer version": ("a newer version", lambda root: rewrite_document(root / "manifest.json", format_version=2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_damage_is_refused(change: str, tmp_path: Path) -> None:
    """By the independent reader: a test of the rules, and that its agreement above is not blindness."""
    root = make_cache(tmp_path / "cache").root
    why, damage = CHANGES[change]
    damage(root)
    with pytest.raises(FormatError, match=why):
        read_cache(root)
