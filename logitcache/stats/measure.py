"""Statistics of a cache's rows: one pass over its chunks, or over a random sample of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.algebra import BlockRanges
from logitcache.errors import CacheError, UsageError
from logitcache.progress import Progress, Silent
from logitcache.stats.columns import Columns
from logitcache.stats.tally import Summary
from logitcache.store import Cache, ChunkRef, open_cache

TOP_IDS = 20
# Chunks, in order, with the numbers of the blocks to look at.
Picked = list[tuple[ChunkRef, NDArray[np.int64]]]


@dataclass(frozen=True)
class StatsOptions:
    """Which rows to look at.

    Args:
        blocks: ranges such as `0:100,250`; by default all.
        sample: look at so many chunks, chosen at random; by default at all.
        seed: of that choice.

    Raises:
        UsageError: a value is out of its range.
    """

    blocks: str | None = None
    sample: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sample is not None and self.sample < 1:
            raise UsageError(f"sample is {self.sample}; look at 1 chunk at least")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}; it must be at least 0")


@dataclass(frozen=True)
class Place:
    """Rows by their position in the block: [first, stop). Means, None where nothing is known; nats but for mass."""

    first: int
    stop: int
    ids: float | None
    kept_mass: float | None
    entropy: float | None
    cross_entropy: float | None


@dataclass(frozen=True)
class UsedId:
    """An id, the share of rows that keep it, its mean weight over all rows, and its text where that is known."""

    id: int
    row_share: float
    mean_weight: float
    token: str | None = None


@dataclass(frozen=True)
class CacheStats:
    """What rows of a cache look like. Masses are shares of 1, entropies and log-probabilities nats.

    Args:
        cache, selection, complete: of the cache.
        keeps_ids: whether its rows have ids; those of `label` caches have none.
        cache_tokens, cache_chunks: all that is stored.
        tokens, chunks: what was looked at.
        rows: tokens among them whose rows count, as all do unless the cache has a mask. All that follows is of these.
        ids: entries of a row; None where there are none.
        kept_mass: mass of a row's exact weights, 1 - tail mass; None for draws and labels, which have none.
        entropy: of the teacher's full distributions; None where it is not stored.
        surprise: minus the teacher's log-probability of the next token; None where it is not stored.
        labelled: rows with a next token.
        label_kept: share of them whose ids hold the next token; None where there are no ids.
        distinct_ids: ids that some row keeps.
        array_bytes: compressed bytes of each array, in the shards that hold what was looked at.
        shard_tokens: tokens of those shards.
        codebook_bytes: of the codec's tables.
        places: means by position in the block.
        top_ids: the ids that most rows keep.
        columns: what all this was made of, for pictures.
    """

    cache: str
    selection: str
    keeps_ids: bool
    complete: bool
    cache_tokens: int
    cache_chunks: int
    tokens: int
    chunks: int
    rows: int
    ids: Summary | None
    kept_mass: Summary | None
    entropy: Summary | None
    surprise: Summary | None
    labelled: int
    label_kept: float | None
    distinct_ids: int
    array_bytes: dict[str, int]
    shard_tokens: int
    codebook_bytes: int
    places: list[Place]
    top_ids: list[UsedId]
    columns: Columns = field(repr=False, compare=False)

    @property
    def cross_entropy(self) -> float | None:
        """The teacher's, in nats a token."""
        return None if self.surprise is None else self.surprise.mean

    @property
    def perplexity(self) -> float | None:
        """exp(cross entropy)."""
        with np.errstate(over="ignore"):
            return None if self.surprise is None else float(np.exp(self.surprise.mean))


def measure_stats(
    location: str | Path,
    options: StatsOptions | None = None,
    token_text: Callable[[int], str | None] = lambda _: None,
    progress: Progress | None = None,
) -> CacheStats:
    """Read the rows of a cache and count. An unfinished cache is read up to its commits.

    Args:
        location: path or URL.
        options: which rows.
        token_text: an id as text.
        progress: told of tokens as they are read.

    Raises:
        CacheError: there is no cache, or it holds no rows yet.
        DamagedCacheError, RemoteError: rows cannot be read.
        UsageError: blocks that are not there.
    """
    options, progress = options or StatsOptions(), progress or Silent()
    cache = open_cache(location, partial=True)
    if not cache.chunks:
        raise CacheError(f"{cache.location} holds no rows yet; run the same dump again to finish it")
    picked = _picked(cache, options)
    columns, array_bytes = _count(cache, picked, progress)
    return CacheStats(
        cache=cache.location,
        selection=str(cache.selection),
        keeps_ids=cache.keeps_ids,
        complete=cache.manifest.complete,
        cache_tokens=cache.num_tokens,
        cache_chunks=len(cache.chunks),
        tokens=columns.tokens,
        chunks=len(picked),
        rows=columns.rows,
        ids=columns.ids.summary(),
        kept_mass=columns.kept.summary(),
        entropy=columns.entropy.summary(),
        surprise=columns.surprise.summary(),
        labelled=columns.labelled,
        label_kept=columns.hits / columns.labelled if columns.labelled and cache.keeps_ids else None,
        distinct_ids=int((columns.id_rows > 0).sum()),
        array_bytes=dict(sorted(array_bytes.items(), key=lambda item: -item[1])),
        shard_tokens=sum(cache.manifest.shards[shard].num_tokens for shard in {ref.shard for ref, _ in picked}),
        codebook_bytes=cache.codebook_bytes,
        places=_places(columns),
        top_ids=_top_ids(columns, token_text),
        columns=columns,
    )


def _picked(cache: Cache, options: StatsOptions) -> Picked:
    """What the options ask for."""
    if options.blocks is None:
        found: Picked = [(ref, np.arange(ref.first_block, ref.first_block + ref.num_blocks)) for ref in cache.chunks]
    else:
        wanted = np.sort(BlockRanges.parse(options.blocks).blocks(cache.num_blocks))
        of_chunk: dict[ChunkRef, list[int]] = {}
        for block in wanted.tolist():
            of_chunk.setdefault(cache.chunk_of(block), []).append(block)
        found = [(ref, np.array(blocks)) for ref, blocks in of_chunk.items()]
    if options.sample is not None and options.sample < len(found):
        chosen = np.random.default_rng(options.seed).choice(len(found), options.sample, replace=False)
        found = [found[number] for number in sorted(chosen.tolist())]
    return found


def _count(cache: Cache, picked: Picked, progress: Progress) -> tuple[Columns, dict[str, int]]:
    """The rows, and the compressed bytes of each array in their shards: each shard is opened once for both."""
    columns = Columns(cache.block_length, cache.keeps_ids, cache.keeps_ids and cache.has_exact_head)
    total = sum(_tokens(cache, ref, blocks) for ref, blocks in picked)
    array_bytes: dict[str, int] = {}
    progress.stage("reading")
    cache.prefetch(dict.fromkeys(ref.shard for ref, _ in picked))
    for shard, of_shard in groupby(picked, key=lambda pair: pair[0].shard):
        for ref, blocks in of_shard:
            for rows in _rows(cache, ref, blocks):
                columns.add(*rows)
            progress.advance(columns.tokens, total, columns.tokens, 0)
        for name, count in cache.stored_bytes([shard]).items():
            array_bytes[name] = array_bytes.get(name, 0) + count
    return columns, array_bytes


def _tokens(cache: Cache, ref: ChunkRef, blocks: NDArray[np.int64]) -> int:
    geometry = cache.manifest.identity.geometry
    if blocks.size == ref.num_blocks:
        return geometry.tokens_in(ref.first_block, ref.first_block + ref.num_blocks)
    return sum(geometry.tokens_in(block, block + 1) for block in blocks.tolist())


def _rows(cache: Cache, ref: ChunkRef, blocks: NDArray[np.int64]) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Tokens, rows, tokens a block and mask of runs of blocks in one chunk."""
    tokens, targets, counted = cache.read_rows(ref)
    counts = cache.manifest.identity.geometry.block_tokens(ref.first_block, ref.first_block + ref.num_blocks)
    begins = np.concatenate([[0], np.cumsum(counts)])
    for run in np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1):
        first, stop = int(run[0]) - ref.first_block, int(run[-1]) + 1 - ref.first_block
        low, high = int(begins[first]), int(begins[stop])
        mask = None if counted is None else counted[low:high]
        yield tokens[low:high], targets.slice(low, high), counts[first:stop], mask


def _places(columns: Columns) -> list[Place]:
    places = columns.places
    means = [places.mean(name) for name in ("ids", "kept_mass", "entropy", "cross_entropy")]
    return [Place(*values) for values in zip(places.firsts, places.stops, *means, strict=True)]


def _top_ids(columns: Columns, token_text: Callable[[int], str | None]) -> list[UsedId]:
    order = np.argsort(-columns.id_rows, kind="stable")[:TOP_IDS]
    used = order[columns.id_rows[order] > 0]
    shares, weights = columns.id_rows[used] / columns.rows, columns.id_mass[used] / columns.rows
    rows = zip(used.tolist(), shares.tolist(), weights.tolist(), strict=True)
    return [UsedId(number, share, weight, token_text(number)) for number, share, weight in rows]
