"""The one loop of every operation: blocks of open caches -> rows, changed or not -> chunks and units of a new cache.

Legend: R real rows of the blocks that are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.algebra.left_out import LeftOut
from logitcache.codec import CodedRows
from logitcache.errors import CacheError, TargetsError
from logitcache.progress import Progress, Silent
from logitcache.store import Ancestor, Cache, CacheWriter, ChunkRef, Identity, Manifest, Origin, Wording
from logitcache.targets import SparseTargets, offsets_of

# Changes the rows of blocks [first, stop) of the new cache: those that count, by a mask bool [R] (None: all R).
Change = Callable[[SparseTargets, int, int, NDArray[np.bool_] | None], SparseTargets]


@dataclass(frozen=True, eq=False)
class Rows:
    """Real tokens int64 [R] and their R rows, coded."""

    tokens: NDArray[np.int64]
    coded: CodedRows

    def cut(self, start: int, stop: int) -> Rows:
        """Rows [start, stop), copied: a few rows must not hold their whole chunk in memory."""
        if (start, stop) == (0, self.tokens.size):
            return self
        return Rows(self.tokens[start:stop].copy(), CodedRows.concatenate([self.coded.slice(start, stop)]))


@dataclass(frozen=True)
class Result:
    """What an operation did.

    Args:
        root: folder of the new cache.
        tokens: tokens it holds.
        computed_tokens: tokens this run wrote; 0 when there was nothing left to do.
        seconds: wall time.
        manifest: of the new cache; None while units are missing, which only `merge` can leave.
        notes: further facts, by name.
    """

    root: Path
    tokens: int
    computed_tokens: int
    seconds: float
    manifest: Manifest | None
    notes: dict[str, Any] = field(default_factory=dict)


class Picked:
    """Blocks of open caches in the order of a new one.

    Args:
        caches: of equal block length and coding of values.
        cache_of: int64 [blocks], the cache each block is in.
        block_of: int64 [blocks], its number there.
    """

    def __init__(self, caches: Sequence[Cache], cache_of: NDArray[np.int64], block_of: NDArray[np.int64]) -> None:
        self.caches, self.cache_of, self.block_of = caches, cache_of, block_of
        self._last: tuple[int, ChunkRef, Rows] | None = None

    @classmethod
    def whole(cls, caches: Sequence[Cache]) -> Picked:
        """All blocks of all caches, one cache after another."""
        sizes = [cache.num_blocks for cache in caches]
        blocks = [np.arange(size, dtype=np.int64) for size in sizes]
        return cls(caches, np.repeat(np.arange(len(caches)), sizes), np.concatenate(blocks))

    def tokens_of_blocks(self) -> list[int]:
        """Real tokens of each block."""
        counts = [np.array(cache.manifest.identity.geometry.block_tokens(0, cache.num_blocks)) for cache in self.caches]
        starts = offsets_of([part.size for part in counts])
        tokens: list[int] = np.concatenate(counts)[starts[self.cache_of] + self.block_of].tolist()
        return tokens

    def read(self, first: int, stop: int) -> Rows:
        """Rows of blocks [first, stop) of the new cache."""
        numbers, blocks = self.cache_of[first:stop], self.block_of[first:stop]
        breaks = (np.flatnonzero((np.diff(blocks) != 1) | (np.diff(numbers) != 0)) + 1).tolist()
        runs = list(zip([0, *breaks], [*breaks, blocks.size], strict=True))
        parts: dict[int, list[Rows]] = {}
        # In the order of the sources: each of their chunks is decoded once, however blocks are shuffled.
        for begin, end in sorted(runs, key=lambda run: (int(numbers[run[0]]), int(blocks[run[0]]))):
            start = int(blocks[begin])
            parts[begin] = list(self._pieces(int(numbers[begin]), start, start + end - begin))
        for number, cache in enumerate(self.caches):
            if number not in numbers:
                # Many merged caches must not keep their files open.
                cache.close()
        pieces = [piece for begin, _ in runs for piece in parts[begin]]
        return Rows(
            np.concatenate([piece.tokens for piece in pieces]),
            CodedRows.concatenate([piece.coded for piece in pieces]),
        )

    def _pieces(self, number: int, start: int, stop: int) -> Iterator[Rows]:
        """Blocks [start, stop) of one cache, chunk by chunk."""
        geometry = self.caches[number].manifest.identity.geometry
        while start < stop:
            ref, rows = self._chunk(number, start)
            end = min(stop, ref.first_block + ref.num_blocks)
            skipped = geometry.tokens_in(ref.first_block, start)
            yield rows.cut(skipped, skipped + geometry.tokens_in(start, end))
            start = end

    def _chunk(self, number: int, block: int) -> tuple[ChunkRef, Rows]:
        """The chunk that holds a block; the last one read is kept."""
        ref = self.caches[number].chunk_of(block)
        if self._last is None or self._last[:2] != (number, ref):
            self._last = number, ref, Rows(*self.caches[number].read_coded(ref))
        return ref, self._last[2]


def rewrite(
    root: Path,
    identity: Identity,
    origin: Origin,
    picked: Picked,
    change: Change | None = None,
    drop: Sequence[str] = (),
    progress: Progress | None = None,
) -> Result:
    """Write, or finish, the cache `identity` at `root` from the blocks `picked`. Killed at any moment, it resumes.

    Args:
        change: makes the new rows; without it the coded rows are moved, and nothing is rounded again.
        drop: columns to set to unknown.

    Raises:
        PlanMismatchError: the folder holds a cache of another plan.
        CacheError: it cannot be written, or a row cannot be changed or stored so.
        DamagedCacheError: a source is damaged.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    writer = CacheWriter.open(root, identity, origin, Wording.of_step(identity))
    make = _Maker(writer, picked, change, drop)
    left_out = LeftOut(picked.caches, picked.cache_of, picked.block_of)
    # Units that an earlier version left without a count would be taken for units with none.
    counts = left_out.known and all("nonfinite" in commit.counters for commit in writer.commits())
    pending, geometry = writer.pending_units(), writer.geometry
    progress.stage("writing" if pending else "nothing left to write")
    before = geometry.num_tokens - sum(geometry.tokens_in(*geometry.unit_range(unit)) for unit in pending)
    computed = written = 0
    for unit in pending:
        first, stop = geometry.unit_range(unit)
        chunks, missing = [], 0
        for begin in range(first, stop, geometry.chunk_blocks):
            if writer.codebook() is None:
                make.codebook()
            end = min(begin + geometry.chunk_blocks, stop)
            rows = make.rows(begin, end)
            if counts and rows.coded.counted is not None:
                missing += left_out.count(begin, geometry.block_tokens(begin, end), rows.coded.counted)
            chunks.append(writer.pack(rows.tokens, rows.coded))
            computed += rows.tokens.size
            progress.advance(before + computed, geometry.num_tokens, computed, written)
        written += writer.commit_unit(unit, chunks, {"nonfinite": missing} if counts else None)
        progress.advance(before + computed, geometry.num_tokens, computed, written)
    return Result(root, geometry.num_tokens, computed, time.perf_counter() - started, writer.finalize())


class _Maker:
    """Makes the rows and the tables of a new cache from picked blocks."""

    def __init__(self, writer: CacheWriter, picked: Picked, change: Change | None, drop: Sequence[str]) -> None:
        self._writer, self._picked, self._change, self._drop = writer, picked, change, drop
        self._source = picked.caches[0]

    def rows(self, first: int, stop: int) -> Rows:
        """Rows of blocks [first, stop) of the new cache. Raises CacheError when one cannot be made or stored."""
        # Rows to be changed may be long: no more of them at once than the source has in a chunk.
        step = stop - first if self._change is None else self._source.manifest.identity.geometry.chunk_blocks
        parts = [self._made(begin, min(begin + step, stop)) for begin in range(first, stop, step)]
        tokens = np.concatenate([part.tokens for part in parts])
        return Rows(tokens, CodedRows.concatenate([part.coded for part in parts]))

    def _made(self, first: int, stop: int) -> Rows:
        rows = self._picked.read(first, stop)
        coded, counted = rows.coded, rows.coded.counted
        if self._change is not None:
            try:
                targets = self._change(self._source.codec.targets(coded.stored()), first, stop, counted)
                coded = self._writer.code(first, targets if counted is None else targets.spread(counted), counted)
            except TargetsError as error:
                where = f"blocks [{first}, {stop}) of {self._writer.layout.root}"
                raise CacheError(f"{where} cannot be made: {error}") from error
        unknown = np.zeros(rows.tokens.size, dtype=np.int64)
        return Rows(rows.tokens, replace(coded, rows={**coded.rows, **dict.fromkeys(self._drop, unknown)}))

    def codebook(self) -> None:
        """Publish tables counted from a pilot: about a chunk, taken from the beginning of every source alike."""
        _, starts = np.unique(self._picked.cache_of, return_index=True)
        share = max(1, self._writer.geometry.chunk_blocks // starts.size)
        parts = []
        for start in sorted(starts.tolist()):
            run = self._picked.cache_of[start : start + share]
            parts.append(self.rows(start, start + int(np.argmax(np.append(run, -1) != run[0]))))
        targets = self._writer.codec.targets(CodedRows.concatenate([part.coded for part in parts]))
        self._writer.publish_pilot(np.concatenate([part.tokens for part in parts]), targets)


def ancestry_of(caches: Sequence[Cache], operation: str, arguments: dict[str, Any]) -> list[Ancestor]:
    """The steps that led to `caches`, each once, and the step that makes a new cache of them."""
    steps: list[Ancestor] = []
    for cache in caches:
        steps += [step for step in cache.manifest.identity.ancestry if step not in steps]
    return [*steps, Ancestor(operation=operation, arguments=arguments, parents=[cache.fingerprint for cache in caches])]
