"""Writes the golden caches of this version of the format: `python -m tests.golden.make FOLDER`.

Never over those in `tests/golden`: a version's caches stay as they were written.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.algebra import merge_caches
from logitcache.codec import LayoutName, RowCodec
from logitcache.store import Cache, CacheWriter, Geometry, Identity, StoredSelection, open_cache
from logitcache.store.layout import ContainerKind
from logitcache.targets import SparseTargets
from tests.golden.rows import DRAWS, HEADS_AND_TAILS, LONGEST, VOCABULARY, mask_of, rows_of, tokens_of

VERSION = 1
BLOCK_LENGTH = 7
# The last block holds one token.
BLOCKS = [7, 7, 7, 7, 7, 1]
SELECTIONS: dict[str, dict[str, Any]] = {
    "top-k": {"method": "top-k", "size": LONGEST},
    "top-p": {"method": "top-p", "size": LONGEST, "mass": 0.95},
    "sample": {"method": "sample", "size": DRAWS},
    "sample-exponent": {"method": "sample", "size": DRAWS, "exponent": 0.75},
    "varopt": {"method": "varopt", "size": HEADS_AND_TAILS},
    "label": {"method": "label", "size": 0},
}
# Selection, layout, container.
FINISHED: list[tuple[str, LayoutName, ContainerKind]] = [
    ("top-k", "small", "zarr"),
    ("top-p", "fast", "arrow"),
    ("sample", "small", "arrow"),
    ("sample", "fast", "zarr"),
    ("sample-exponent", "small", "zarr"),
    ("sample-exponent", "fast", "arrow"),
    ("varopt", "small", "arrow"),
    ("varopt", "fast", "zarr"),
    ("label", "small", "zarr"),
]
MASKED: list[tuple[str, LayoutName, ContainerKind]] = [
    ("sample", "small", "zarr"),
    ("top-k", "fast", "arrow"),
    ("label", "fast", "arrow"),
]


def write(
    root: Path,
    name: str,
    layout: LayoutName,
    container: ContainerKind,
    blocks: list[int] | None = None,
    seed: int = 0,
    unit_blocks: int = 6,
    units: set[int] | None = None,
    masked: bool = False,
) -> tuple[NDArray[np.int64], SparseTargets]:
    """A cache of made-up rows, up to `units` or finished; returns its tokens int64 [N] and rows."""
    blocks = BLOCKS if blocks is None else blocks
    selection = StoredSelection(**SELECTIONS[name])
    codec = RowCodec.for_selection(selection.method, selection.size, selection.exponent, layout, masked)
    identity = Identity(
        teacher={"name": "none: the rows are made up"},
        tokenizer={"sha256": "0" * 64, "size": VOCABULARY},
        vocab_size=VOCABULARY,
        corpus={"files": [], "sha256": f"{seed:064x}", "num_tokens": sum(blocks)},
        selection=selection,
        seed=seed,
        codec=codec.to_dict(),
        geometry=Geometry.of_blocks(blocks, BLOCK_LENGTH, 2, unit_blocks),
        container=container,
    )
    tokens = tokens_of(sum(blocks), seed)
    targets = rows_of(codec.values.name, tokens, seed)
    counted = mask_of(blocks, seed) if masked else None
    writer = CacheWriter.open(root, identity)
    half = len(targets) // 2
    writer.publish_pilot(tokens[:half], targets.slice(0, half))
    for unit in writer.pending_units():
        if units is None or unit in units:
            _commit(writer, unit, tokens, targets, counted)
    if not writer.pending_units():
        writer.finalize()
    return tokens, targets


def _commit(
    writer: CacheWriter,
    unit: int,
    tokens: NDArray[np.int64],
    targets: SparseTargets,
    counted: NDArray[np.bool_] | None,
) -> None:
    geometry = writer.geometry
    first, stop = geometry.unit_range(unit)
    chunks = []
    for begin in range(first, stop, geometry.chunk_blocks):
        low, high = (geometry.tokens_in(0, block) for block in (begin, min(begin + geometry.chunk_blocks, stop)))
        mask = None if counted is None else counted[low:high]
        chunks.append(writer.encode(begin, tokens[low:high], targets.slice(low, high), mask))
    writer.commit_unit(unit, chunks, {"nan_rows": unit})


def content(cache: Cache) -> dict[str, list[Any]]:
    """Everything a cache stores, token by token: plain values, floats that are no JSON numbers as text."""
    stored: dict[str, list[Any]] = {"blocks": [], "tokens": []}
    for ref in cache.chunks:
        blocks = cache.read_chunk(ref)
        rows = np.flatnonzero(blocks.valid)
        targets = blocks.targets.take(rows)
        stored["blocks"] += (ref.first_block + rows // cache.block_length).tolist()
        stored["tokens"] += blocks.tokens.ravel()[rows].tolist()
        for name, values in columns_of(targets).items():
            stored.setdefault(name, []).extend(values)
        if blocks.counted is not None:
            stored.setdefault("counted", []).extend(blocks.counted.ravel()[rows].astype(int).tolist())
    return stored


def columns_of(targets: SparseTargets) -> dict[str, list[Any]]:
    """Rows as plain values."""
    cuts = targets.offsets[1:-1]
    return {
        "ids": [row.tolist() for row in np.split(targets.ids, cuts)],
        "weights": [_plain(row) for row in np.split(targets.weights, cuts)],
        **{name: _plain(getattr(targets, name)) for name in ("tail_mass", "threshold", "label_logprob", "entropy")},
    }


def _plain(values: NDArray[np.float32]) -> list[float | str]:
    """The shortest decimals of float32 numbers."""
    return [float(str(value)) if np.isfinite(value) else str(value) for value in values]


def make(folder: Path) -> None:
    """Write every golden cache and, beside each, what must be read from it."""
    folder.mkdir(parents=True)
    for seed, (name, layout, container) in enumerate(FINISHED, start=1):
        write(folder / f"{name}-{layout}-{container}", name, layout, container, seed=seed)
    for seed, (name, layout, container) in enumerate(MASKED, start=40):
        write(folder / f"masked-{name}-{layout}-{container}", name, layout, container, seed=seed, masked=True)
    unfinished = folder / "unfinished-top-k-fast-arrow"
    write(unfinished, "top-k", "fast", "arrow", [*BLOCKS[:-1], 7, 7, 2], 20, unit_blocks=3, units={0, 2})
    with tempfile.TemporaryDirectory() as work:
        parts = [Path(work) / "one", Path(work) / "other"]
        for seed, (part, blocks) in enumerate(zip(parts, ([7, 7, 3], [7, 1]), strict=True), start=30):
            write(part, "varopt", "small", "zarr", blocks, seed, unit_blocks=3)
        merge_caches(parts, folder / "merged-varopt-small-zarr")
    for cache in sorted(path for path in folder.iterdir() if path.is_dir()):
        lines = [f'"{name}": {json.dumps(values)}' for name, values in content(open_cache(cache, partial=True)).items()]
        cache.with_suffix(".json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
