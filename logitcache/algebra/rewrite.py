"""The one loop of every operation: blocks of open caches -> rows, changed or not -> chunks and units of a new cache.

Legend: R real rows of the blocks that are read, N = all blocks' positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import CacheError, TargetsError
from logitcache.store import Ancestor, Blocks, Cache, CacheWriter, Identity, Manifest, Origin
from logitcache.targets import SparseTargets

# Changes the R rows of blocks [first, stop) of the new cache.
Change = Callable[[SparseTargets, int, int], SparseTargets]


class Progress(Protocol):
    """What an operation reports while it runs; the command line draws it."""

    def stage(self, what: str) -> None:
        """A new stage began."""

    def advance(self, done: int, total: int, computed: int, num_bytes: int) -> None:
        """`done` of `total` tokens are finished, `computed` of them in this run, which wrote `num_bytes`."""


class Silent:
    """Reports nothing."""

    def stage(self, what: str) -> None:
        pass

    def advance(self, done: int, total: int, computed: int, num_bytes: int) -> None:
        pass


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


@dataclass(frozen=True, eq=False)
class Picked:
    """Blocks of open caches in the order of a new one.

    Args:
        caches: of equal block length.
        cache_of: int64 [blocks], the cache each block is in.
        block_of: int64 [blocks], its number there.
    """

    caches: Sequence[Cache]
    cache_of: NDArray[np.int64]
    block_of: NDArray[np.int64]

    @classmethod
    def whole(cls, caches: Sequence[Cache]) -> Picked:
        """All blocks of all caches, one cache after another."""
        sizes = [cache.num_blocks for cache in caches]
        return cls(
            caches,
            np.repeat(np.arange(len(caches)), sizes),
            np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]),
        )

    def tokens_of_blocks(self) -> list[int]:
        """Real tokens of each block."""
        counts = [np.array(cache.manifest.identity.geometry.block_tokens(0, cache.num_blocks)) for cache in self.caches]
        starts = np.concatenate([[0], np.cumsum([part.size for part in counts])[:-1]]).astype(np.int64)
        tokens: list[int] = np.concatenate(counts)[starts[self.cache_of] + self.block_of].tolist()
        return tokens

    def read(self, first: int, stop: int) -> tuple[NDArray[np.int64], SparseTargets]:
        """Real tokens int64 [R] and their rows, of blocks [first, stop) of the new cache."""
        numbers, blocks = self.cache_of[first:stop], self.block_of[first:stop]
        breaks = np.flatnonzero((np.diff(blocks) != 1) | (np.diff(numbers) != 0)) + 1
        runs = list(zip([0, *breaks.tolist()], [*breaks.tolist(), blocks.size], strict=True))
        parts: dict[int, Blocks] = {}
        # In the order of the sources: each of their chunks is decoded once, however blocks are shuffled.
        for begin, end in sorted(runs, key=lambda run: (int(numbers[run[0]]), int(blocks[run[0]]))):
            source, start = self.caches[int(numbers[begin])], int(blocks[begin])
            parts[begin] = source.read_blocks(start, start + end - begin)
        for number, cache in enumerate(self.caches):
            if number not in numbers:
                # Many merged caches must not stay open, with their last chunks in memory.
                cache.close()
        ordered = [parts[begin] for begin, _ in runs]
        valid = np.concatenate([part.valid.ravel() for part in ordered])
        tokens = np.concatenate([part.tokens.ravel() for part in ordered])
        targets = SparseTargets.concatenate([part.targets for part in ordered])
        return (tokens, targets) if valid.all() else (tokens[valid], targets.take(np.flatnonzero(valid)))


def rewrite(
    root: Path,
    identity: Identity,
    origin: Origin,
    picked: Picked,
    change: Change | None = None,
    progress: Progress | None = None,
) -> Result:
    """Write, or finish, the cache `identity` at `root` from the blocks `picked`. Killed at any moment, it resumes.

    Raises:
        PlanMismatchError: the folder holds a cache of another plan.
        CacheError: it cannot be written, or a row cannot be changed or stored so.
        DamagedCacheError: a source is damaged.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    writer = CacheWriter.open(root, identity, origin)
    pending, geometry = writer.pending_units(), writer.geometry
    progress.stage("writing" if pending else "nothing left to write")
    before = geometry.num_tokens - sum(geometry.tokens_in(*geometry.unit_range(unit)) for unit in pending)
    computed = written = 0
    for unit in pending:
        first, stop = geometry.unit_range(unit)
        chunks = []
        for begin in range(first, stop, geometry.chunk_blocks):
            end = min(begin + geometry.chunk_blocks, stop)
            if writer.ranks() is None:
                writer.publish_ranks(_pilot_ids(picked, change, geometry.chunk_blocks))
            tokens, targets = _changed(picked, change, begin, end)
            chunks.append(writer.encode(tokens, targets))
            computed += tokens.size
            progress.advance(before + computed, geometry.num_tokens, computed, written)
        written += writer.commit_unit(unit, chunks)
        progress.advance(before + computed, geometry.num_tokens, computed, written)
    return Result(root, geometry.num_tokens, computed, time.perf_counter() - started, writer.finalize())


def ancestry_of(caches: Sequence[Cache], operation: str, arguments: dict[str, Any]) -> list[Ancestor]:
    """The steps that led to `caches`, each once, and the step that makes a new cache of them."""
    steps: list[Ancestor] = []
    for cache in caches:
        steps += [step for step in cache.manifest.identity.ancestry if step not in steps]
    return [*steps, Ancestor(operation=operation, arguments=arguments, parents=[cache.fingerprint for cache in caches])]


def refuse_same_folder(sources: Sequence[Cache], root: Path) -> None:
    """Raise CacheError when the new cache would lie where an old one is."""
    for cache in sources:
        if cache.root.resolve() == root.resolve():
            raise CacheError(f"{root} is the cache to read from; choose another folder for --out")


def _changed(picked: Picked, change: Change | None, first: int, stop: int) -> tuple[NDArray[np.int64], SparseTargets]:
    tokens, targets = picked.read(first, stop)
    try:
        return tokens, targets if change is None else change(targets, first, stop)
    except TargetsError as error:
        raise CacheError(f"blocks [{first}, {stop}) of the new cache cannot be made: {error}") from error


def _pilot_ids(picked: Picked, change: Change | None, chunk_blocks: int) -> NDArray[np.int64]:
    """Ids to order the vocabulary by: about a chunk, taken from the beginning of every source alike."""
    _, starts = np.unique(picked.cache_of, return_index=True)
    share = max(1, chunk_blocks // starts.size)
    parts = []
    for start in sorted(starts.tolist()):
        run = picked.cache_of[start : start + share]
        stop = start + int(np.argmax(np.append(run, -1) != run[0]))
        parts.append(_changed(picked, change, start, stop)[1].ids)
    return np.concatenate(parts)
