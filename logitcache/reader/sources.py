"""What blocks can be read from: one cache, several averaged block by block, or several mixed.

Legend: R rows (the real tokens of a chunk), nnz entries, M caches, V rows of the teacher's head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import FRESH, Memory
from logitcache.errors import DamagedCacheError, TrainingError
from logitcache.reader.order import CHUNKS_PER_WINDOW
from logitcache.store import Blocks, Cache, ChunkRef
from logitcache.targets import SparseTargets

# Real tokens, their rows, and which of them count (None: all).
Rows = tuple[NDArray[np.int64], SparseTargets | None, NDArray[np.bool_] | None]


class BlockSource(ABC):
    """Numbered blocks, decoded a chunk at a time.

    Attributes:
        fingerprints: of the caches behind it.
        shares: of these in an average.
        chunks: all of them, in the order of their blocks.
        num_blocks, num_tokens, block_length, vocab_size, unbiased, has_exact_head, keeps_ids, masked: as in `Cache`.
        tokenizer: its sha256.
        location: for messages.
    """

    fingerprints: list[str]
    shares: list[float]
    chunks: Sequence[ChunkRef]
    num_blocks: int
    num_tokens: int
    block_length: int
    vocab_size: int
    unbiased: bool
    has_exact_head: bool
    keeps_ids: bool
    masked: bool
    tokenizer: str
    location: str

    @abstractmethod
    def read(self, ref: ChunkRef, memory: Memory = FRESH, with_targets: bool = True) -> Rows:
        """A chunk's real tokens int64 [R], their rows, None without targets, and bool [R], which count, None for all.

        Raises DamagedCacheError.
        """

    @abstractmethod
    def read_blocks(self, start: int, stop: int) -> Blocks:
        """Blocks [start, stop), as `Cache.read_blocks`."""

    @abstractmethod
    def block_tokens(self, first: int, stop: int) -> list[int]:
        """Real tokens of each block of [first, stop)."""

    @abstractmethod
    def prefetch(self, chunks: Sequence[ChunkRef]) -> None:
        """Say which chunks are read next: shards of remote caches begin to be fetched."""


class CacheSource(BlockSource):
    """One cache as a `BlockSource`. Raises TrainingError where units are missing."""

    def __init__(self, cache: Cache) -> None:
        _refuse_holes(cache)
        self.cache = cache
        self.fingerprints, self.shares, self.chunks = [cache.fingerprint], [1.0], cache.chunks
        self.num_blocks, self.num_tokens, self.block_length = cache.num_blocks, cache.num_tokens, cache.block_length
        self.vocab_size = cache.vocab_size
        self.unbiased, self.has_exact_head, self.keeps_ids = cache.unbiased, cache.has_exact_head, cache.keeps_ids
        self.masked, self.tokenizer = cache.masked, cache.tokenizer
        self.location = cache.location

    def read(self, ref: ChunkRef, memory: Memory = FRESH, with_targets: bool = True) -> Rows:
        if with_targets:
            return self.cache.read_rows(ref, memory)
        return self.cache.read_tokens(ref), None, self.cache.read_counted(ref)

    def read_blocks(self, start: int, stop: int) -> Blocks:
        return self.cache.read_blocks(start, stop)

    def block_tokens(self, first: int, stop: int) -> list[int]:
        return self.cache.manifest.identity.geometry.block_tokens(first, stop)

    def prefetch(self, chunks: Sequence[ChunkRef]) -> None:
        self.cache.prefetch(dict.fromkeys(ref.shard for ref in chunks))


class AveragedCaches(BlockSource):
    """Several teachers' caches of the same token blocks, read as the average of their distributions.

    A row is the union of the teachers' rows. An id that one of them did not store counts 0 for it: for unbiased caches
    the mean stays unbiased; for top-k and top-p the teacher's mass for that id stays in its tail, as it is stored.
    `tail_mass` and `entropy` are means (the latter is at most the average's own entropy), `label_logprob` is the log of
    the mean probability, and no weight of an unbiased average is exact.

    Args:
        caches: one or more, with the same tokenizer and corpus, all unbiased or none.
        weights: of the teachers; equal by default. They are scaled to sum to 1.

    Raises:
        TrainingError: the caches do not hold the same blocks, or cannot be averaged.
    """

    def __init__(self, caches: Sequence[Cache], weights: Sequence[float] | None = None) -> None:
        self.caches, self.shares = list(caches), shares_of(len(caches), weights).tolist()
        for cache in caches:
            _refuse_holes(cache)
        for other in caches[1:]:
            _refuse_other_blocks(caches[0], other)
        # With the largest chunks as the grid, no chunk of another cache is decoded twice.
        grid = max(caches, key=lambda cache: cache.manifest.identity.geometry.chunk_blocks)
        self._grid, self.chunks = grid, grid.chunks
        self.fingerprints = [cache.fingerprint for cache in caches]
        self.num_blocks, self.num_tokens, self.block_length = grid.num_blocks, grid.num_tokens, grid.block_length
        self.vocab_size = max(cache.vocab_size for cache in caches)
        self.unbiased, self.keeps_ids = grid.unbiased, grid.keeps_ids
        self.has_exact_head = not grid.unbiased or (len(caches) == 1 and grid.has_exact_head)
        self.masked, self.tokenizer = grid.masked, grid.tokenizer
        self.location = "the average of " + " and ".join(cache.location for cache in caches)
        for cache in caches:
            cache.keep_chunks(CHUNKS_PER_WINDOW)

    def read(self, ref: ChunkRef, memory: Memory = FRESH, with_targets: bool = True) -> Rows:
        if not with_targets or len(self.caches) == 1:
            return CacheSource(self._grid).read(ref, memory, with_targets)
        tokens, rows, counted = self._grid.read_rows(ref)
        parts = [rows if cache is self._grid else self._rows_of(cache, ref, tokens, counted) for cache in self.caches]
        return tokens, average_rows(parts, self.shares), counted

    def read_blocks(self, start: int, stop: int) -> Blocks:
        first, *others = [cache.read_blocks(start, stop) for cache in self.caches]
        for cache, other in zip(self.caches[1:], others, strict=True):
            if not (np.array_equal(first.tokens, other.tokens) and _same_mask(first.counted, other.counted)):
                raise _other_tokens(self.caches[0], cache, start, stop)
        if not others:
            return first
        return replace(first, targets=average_rows([blocks.targets for blocks in (first, *others)], self.shares))

    def block_tokens(self, first: int, stop: int) -> list[int]:
        return self._grid.manifest.identity.geometry.block_tokens(first, stop)

    def prefetch(self, chunks: Sequence[ChunkRef]) -> None:
        for cache in self.caches:
            there = [
                number
                for ref in chunks
                for number, shard in enumerate(cache.manifest.shards)
                if shard.first_block < ref.first_block + ref.num_blocks
                and ref.first_block < shard.first_block + shard.num_blocks
            ]
            cache.prefetch(dict.fromkeys(there))

    def _rows_of(
        self, cache: Cache, ref: ChunkRef, tokens: NDArray[np.int64], counted: NDArray[np.bool_] | None
    ) -> SparseTargets:
        """The rows of the same blocks in another cache."""
        stop = ref.first_block + ref.num_blocks
        blocks = cache.read_blocks(ref.first_block, stop)
        mask = None if blocks.counted is None else blocks.counted[blocks.valid]
        if not (np.array_equal(blocks.tokens[blocks.valid], tokens) and _same_mask(mask, counted)):
            raise _other_tokens(cache, self._grid, ref.first_block, stop)
        return blocks.targets.take(np.flatnonzero(blocks.valid))


@dataclass(frozen=True, eq=False)
class MixedCaches:
    """Several corpora read as one stream, each with its share of the blocks.

    The stream visits the corpora as evenly as their weights allow, so that any long stretch of it has their shares;
    inside a corpus, blocks come in its own shuffled order, epoch after epoch.

    Args:
        sources: caches, or averages of caches; with one tokenizer and block length, all unbiased or none.
        weights: shares of the blocks; scaled to sum to 1.
        ranges: blocks [first, stop) to read of each; all of them by default.

    Raises:
        TrainingError: the sources cannot be mixed.
    """

    sources: Sequence[Cache | AveragedCaches]
    weights: Sequence[float]
    ranges: Sequence[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        shares_of(len(self.sources), self.weights)
        if self.ranges is not None and len(self.ranges) != len(self.sources):
            raise TrainingError(f"{len(self.sources)} caches are mixed, but {len(self.ranges)} ranges given")
        first, *others = sources_of(self)
        for other in others:
            for what in ("tokenizer", "block_length", "unbiased"):
                mine, theirs = getattr(first, what), getattr(other, what)
                if mine != theirs:
                    raise TrainingError(
                        f"{first.location} and {other.location} cannot be mixed: {what} is {mine} and {theirs}; dump "
                        "both with one tokenizer, block length and kind of selection"
                    )


def sources_of(source: Cache | AveragedCaches | MixedCaches) -> list[BlockSource]:
    """The streams of blocks that a dataset reads: one, unless caches are mixed."""
    if isinstance(source, MixedCaches):
        return [one for each in source.sources for one in sources_of(each)]
    return [CacheSource(source) if isinstance(source, Cache) else source]


def shares_of(count: int, weights: Sequence[float] | None) -> NDArray[np.float64]:
    """float64 [count] that sum to 1. Raises TrainingError."""
    shares = np.ones(count) if weights is None else np.array(weights, dtype=np.float64)
    if not count or shares.shape != (count,) or not (shares > 0).all() or not math.isfinite(sum(shares.tolist())):
        raise TrainingError(f"weights {weights} do not give each of {count} caches a positive share")
    return shares / shares.sum()


def average_rows(parts: Sequence[SparseTargets], shares: Sequence[float]) -> SparseTargets:
    """The weighted mean of M distributions of each row, as the union of their rows; see `AveragedCaches`."""
    rows = np.concatenate([part.row_index() for part in parts])
    ids = np.concatenate([part.ids for part in parts]).astype(np.int64)
    weights = np.concatenate([part.weights * share for part, share in zip(parts, shares, strict=True)])
    keys, place = np.unique(rows * (int(ids.max(initial=0)) + 1) + ids, return_inverse=True)
    means = np.bincount(place, weights, minlength=keys.size)
    width = int(ids.max(initial=0)) + 1
    offsets = np.searchsorted(keys // width, np.arange(len(parts[0]) + 1))
    with np.errstate(divide="ignore"):
        label = np.log(_mean([np.exp(part.label_logprob.astype(np.float64)) for part in parts], shares))
    tail = _mean([part.tail_mass for part in parts], shares)
    return SparseTargets(
        offsets,
        keys % width,
        means,
        tail_mass=np.clip(tail, 0, 1),
        label_logprob=label,
        entropy=_mean([part.entropy for part in parts], shares),
        unbiased=parts[0].unbiased,
    )


def _mean(columns: Sequence[NDArray[Any]], shares: Sequence[float]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.einsum("m,mr->r", np.array(shares), np.stack(columns).astype(np.float64))
    return total


def _shown(fact: Any) -> str:
    """The beginning of a hash, or a fact as it is."""
    return "none" if fact is None else str(fact)[:12] if isinstance(fact, str) else str(fact)


def _same_mask(one: NDArray[np.bool_] | None, other: NDArray[np.bool_] | None) -> bool:
    return one is other is None or (one is not None and other is not None and np.array_equal(one, other))


def _other_tokens(one: Cache, other: Cache, start: int, stop: int) -> DamagedCacheError:
    return DamagedCacheError(
        f"{one.location} and {other.location} name the same corpus, but hold other tokens or masks in blocks {start} "
        f"to {stop - 1}; average whole caches, or the same subset of each"
    )


def _refuse_holes(cache: Cache) -> None:
    """Raise TrainingError unless every block of the cache can be read."""
    if not cache.is_whole:
        raise TrainingError(
            f"{cache.location} is unfinished; read a snapshot of it, cache.snapshot(), which stays the same while the "
            "dump goes on"
        )


def _refuse_other_blocks(one: Cache, other: Cache) -> None:
    """Raise TrainingError unless both caches hold rows for the same token blocks, of the same kind."""
    facts = [
        {
            "tokenizer": cache.manifest.identity.tokenizer.get("sha256"),
            "corpus": cache.manifest.identity.corpus.get("sha256"),
            "mask": cache.manifest.identity.corpus.get("mask_sha256"),
            "keeping ids": cache.keeps_ids,
            "block length": cache.block_length,
            "number of tokens": cache.manifest.identity.geometry.num_tokens,
            "number of blocks": cache.num_blocks,
            "short blocks": cache.manifest.identity.geometry.short_blocks,
            "unbiased": cache.unbiased,
        }
        for cache in (one, other)
    ]
    for what, mine in facts[0].items():
        if mine != facts[1][what]:
            raise TrainingError(
                f"{one.location} and {other.location} cannot be averaged: {what} is {_shown(mine)} and "
                f"{_shown(facts[1][what])}; dump both teachers over the same text with the same tokenizer, block "
                "length and kind of selection"
            )
