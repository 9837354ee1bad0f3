"""Caches of random rows that look like a teacher's to codecs and readers, without a teacher.

Legend: N rows, K ids or draws a row, V ids.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import LayoutName, RowCodec
from logitcache.store import Cache, CacheWriter, ContainerKind, Geometry, Identity, StoredSelection, open_cache
from logitcache.targets import SparseTargets

VOCABULARY = 49_152
BLOCK_LENGTH = 512
# As `logitcache dump` groups blocks.
CHUNK_ENTRIES, CHUNK_TOKENS, UNITS, LEAST_UNIT_TOKENS = 1 << 20, 1 << 16, 32, 1 << 16


def make_cache(root: Path, method: str, size: int, layout: LayoutName, container: ContainerKind, tokens: int) -> Cache:
    """A finished cache of `sample:size` or `top-k:size` rows; one that is there already is opened."""
    most = min(CHUNK_TOKENS, CHUNK_ENTRIES // size) // BLOCK_LENGTH
    chunk_blocks = 1 << most.bit_length() - 1
    unit_blocks = max(tokens // UNITS, LEAST_UNIT_TOKENS) // BLOCK_LENGTH // chunk_blocks * chunk_blocks
    identity = Identity(
        teacher={"name": "random numbers"},
        tokenizer={"sha256": "0" * 64},
        vocab_size=VOCABULARY,
        corpus={"sha256": "1" * 64},
        selection=StoredSelection(method=method, size=size),  # type: ignore[arg-type]
        seed=0,
        codec=RowCodec.for_selection(method, size, None, layout).to_dict(),
        geometry=Geometry(
            num_tokens=tokens,
            block_length=BLOCK_LENGTH,
            chunk_blocks=chunk_blocks,
            unit_blocks=max(unit_blocks, chunk_blocks),
        ),
        container=container,
    )
    writer = CacheWriter.open(root, identity)
    for unit in writer.pending_units():
        writer.commit_unit(
            unit, [_chunk(writer, begin, method, size) for begin in _chunk_starts(writer.geometry, unit)]
        )
    writer.finalize()
    return open_cache(root)


def _chunk_starts(geometry: Geometry, unit: int) -> range:
    first, stop = geometry.unit_range(unit)
    return range(first, stop, geometry.chunk_blocks)


def _chunk(writer: CacheWriter, begin: int, method: str, size: int) -> dict[str, NDArray[np.int64]]:
    geometry, rng = writer.geometry, np.random.default_rng(begin)
    stop = min(begin + geometry.chunk_blocks, geometry.num_blocks)
    stop = min(stop, (begin // geometry.unit_blocks + 1) * geometry.unit_blocks)
    count = geometry.tokens_in(begin, stop)
    tokens = _frequent(rng, (count,))
    rows = _draws(rng, count, size) if method == "sample" else _top(rng, count, size)
    if writer.codebook() is None:
        writer.publish_pilot(tokens, rows)
    return writer.encode(begin, tokens, rows)


def _frequent(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Ids of which id i comes about 1 / i as often."""
    return (VOCABULARY ** rng.random(shape, dtype=np.float32)).astype(np.int64).clip(1, VOCABULARY) - 1


def _draws(rng: np.random.Generator, count: int, draws: int) -> SparseTargets:
    """Draws of which a share, different in each row, hit one id: about half as many distinct ids as draws."""
    drawn_NK = _frequent(rng, (count, draws))
    sure_N1 = 0.95 * rng.random((count, 1), dtype=np.float32)
    drawn_NK = np.where(rng.random((count, draws), dtype=np.float32) < sure_N1, drawn_NK[:, :1], drawn_NK)
    drawn_NK.sort(axis=1)
    new_NK = np.diff(drawn_NK, axis=1, prepend=-1) > 0
    starts = np.flatnonzero(new_NK)
    counts = np.diff(np.append(starts, new_NK.size))
    offsets = np.append(0, np.cumsum(new_NK.sum(1)))
    label_logprob, entropy = _side(rng, count)
    return SparseTargets(
        offsets, drawn_NK[new_NK], counts / draws, label_logprob=label_logprob, entropy=entropy, unbiased=True
    )


def _top(rng: np.random.Generator, count: int, size: int) -> SparseTargets:
    """Distinct ids as frequent as those of `_frequent`, with weights of very different sizes and some tail."""
    slots = np.arange(size)
    spread_NK = (slots + rng.random((count, size), dtype=np.float32)) / size
    ids_NK = ((VOCABULARY - size) ** spread_NK).astype(np.int64)
    ids_NK = np.maximum.accumulate(ids_NK - slots, axis=1) + slots
    weights_NK = rng.random((count, size), dtype=np.float32) ** 6 + 1e-4
    tail_N = 0.2 * rng.random(count)
    weights_NK *= ((1 - tail_N) / weights_NK.sum(1))[:, None]
    label_logprob, entropy = _side(rng, count)
    offsets = np.arange(0, ids_NK.size + 1, size)
    return SparseTargets(offsets, ids_NK.ravel(), weights_NK.ravel(), label_logprob=label_logprob, entropy=entropy)


def _side(rng: np.random.Generator, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """label_logprob and entropy [N]."""
    return -rng.exponential(3, count), rng.exponential(3, count)
