"""Small caches written without a teacher, and what must be read back from them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import LayoutName, RowCodec
from logitcache.store import Blocks, CacheWriter, Geometry, Identity, StoredSelection
from logitcache.store.files import checked_json
from logitcache.store.layout import SUFFIXES, ContainerKind
from logitcache.targets import SparseTargets
from tests.codec.rows import assert_equal, count_rows, probability_rows

VOCABULARY = 400
CONTAINERS = list(SUFFIXES)
GEOMETRY = Geometry(num_tokens=103, block_length=5, chunk_blocks=3, unit_blocks=8)


@dataclass(frozen=True)
class Made:
    """A cache and its content: tokens int64 [num_tokens] and their rows."""

    root: Path
    tokens: NDArray[np.int64]
    targets: SparseTargets

    def copy(self, root: Path) -> Made:
        """The same cache in another folder."""
        shutil.copytree(self.root, root)
        return Made(root, self.tokens, self.targets)

    def check(self, blocks: Blocks, start: int, stop: int) -> None:
        """`blocks` are exactly blocks [start, stop), with nothing where the corpus has ended."""
        length = GEOMETRY.block_length
        first, last = start * length, min(stop * length, GEOMETRY.num_tokens)
        padding = stop * length - last
        assert blocks.first_block == start
        np.testing.assert_array_equal(blocks.tokens.ravel(), np.pad(self.tokens[first:last], (0, padding)))
        np.testing.assert_array_equal(blocks.valid.ravel(), np.arange(first, stop * length) < last)
        assert_equal(blocks.targets.slice(0, last - first), self.targets.slice(first, last))
        assert len(blocks.targets) == stop * length - first
        assert (blocks.targets.row_lengths[last - first :] == 0).all()


def identity(
    kind: str = "counts",
    seed: int = 0,
    geometry: Geometry = GEOMETRY,
    container: ContainerKind = "zarr",
    layout: LayoutName = "small",
) -> Identity:
    """Of a cache of `sample:9` or `top-k:9` rows."""
    method = "sample" if kind == "counts" else "top-k"
    return Identity(
        teacher={"name": "none"},
        tokenizer={"sha256": "0" * 64},
        vocab_size=VOCABULARY,
        corpus={"files": [], "sha256": "1" * 64},
        selection=StoredSelection(method=method, size=9),
        seed=seed,
        codec=RowCodec.for_selection(method, 9, None, layout).to_dict(),
        geometry=geometry,
        container=container,
    )


def content(kind: str = "counts", seed: int = 0, geometry: Geometry = GEOMETRY) -> tuple[Any, SparseTargets]:
    """Tokens and rows."""
    rng = np.random.default_rng([seed, 77])
    make = count_rows if kind == "counts" else probability_rows
    targets = make(rng, geometry.num_tokens, VOCABULARY, 9)
    return rng.integers(0, VOCABULARY, geometry.num_tokens), targets


def stored(writer: CacheWriter, targets: SparseTargets) -> SparseTargets:
    """Rows as a cache gives them back: the codec's own rounding is another test's business."""
    return writer.codec.targets(writer.codec.code(targets, np.random.default_rng(0).random))


def commit(writer: CacheWriter, unit: int, tokens: NDArray[np.int64], targets: SparseTargets) -> int:
    """Encode and commit one unit."""
    geometry = writer.geometry
    first, stop = geometry.unit_range(unit)
    chunks = []
    for begin in range(first, stop, geometry.chunk_blocks):
        end = min(begin + geometry.chunk_blocks, stop)
        low = geometry.tokens_in(0, begin)
        rows = targets.slice(low, low + geometry.tokens_in(begin, end))
        chunk_tokens = tokens[low : low + len(rows)]
        chunks.append(writer.encode(begin, chunk_tokens, rows))
    return writer.commit_unit(unit, chunks)


def make_cache(
    root: Path,
    kind: str = "counts",
    seed: int = 0,
    units: range | None = None,
    container: ContainerKind = "zarr",
) -> Made:
    """Write a cache of 3 units, 7 chunks and 21 blocks, the last one padded; unfinished if `units` are not all."""
    tokens, targets = content(kind, seed)
    writer = CacheWriter.open(root, identity(kind, seed, container=container))
    for unit in units if units is not None else writer.pending_units():
        commit(writer, unit, tokens, targets)
    if not writer.pending_units():
        writer.finalize()
    return Made(root, tokens, stored(writer, targets))


def files_of(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of a checksummed JSON document and give it the right checksum: what an attacker would do."""
    fields = json.loads(path.read_text())
    fields.pop("checksum")
    path.write_bytes(checked_json({**fields, **changes}))
