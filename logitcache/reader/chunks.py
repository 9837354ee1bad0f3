"""Decoded chunks of the coming windows: a bounded number of them, made on other threads, in memory used again."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import Arena, ReusedMemory
from logitcache.reader.order import BlockOrder, Window
from logitcache.reader.sources import BlockSource
from logitcache.store import ChunkRef
from logitcache.targets import SparseTargets, offsets_of

# The last window of an epoch may have few chunks; then those of the one after it are near, too.
WINDOWS_AHEAD = 2


@dataclass(frozen=True, eq=False)
class BlockRows:
    """One block inside a decoded chunk.

    Args:
        tokens: int64 [R], its real tokens.
        targets: rows of the whole chunk; None where only tokens are read.
        first_row, stop_row: the block's rows among them.
        counted: bool [R], whether the next token is one to learn; None where all are.
    """

    tokens: NDArray[np.int64]
    targets: SparseTargets | None
    first_row: int
    stop_row: int
    counted: NDArray[np.bool_] | None = None

    @property
    def num_entries(self) -> int:
        if self.targets is None:
            return 0
        return int(self.targets.offsets[self.stop_row] - self.targets.offsets[self.first_row])


@dataclass(frozen=True, eq=False)
class DecodedChunk:
    """A chunk's real tokens int64 [R], their rows, which of them count, and where each block begins among them."""

    ref: ChunkRef
    tokens: NDArray[np.int64]
    targets: SparseTargets | None
    counted: NDArray[np.bool_] | None
    starts: NDArray[np.int64]
    arena: Arena

    def block(self, number: int) -> BlockRows:
        """One block, by its number in the cache."""
        index = number - self.ref.first_block
        first, stop = int(self.starts[index]), int(self.starts[index + 1])
        counted = None if self.counted is None else self.counted[first:stop]
        return BlockRows(self.tokens[first:stop], self.targets, first, stop, counted)


@dataclass
class ChunkCount:
    """Chunks sent to be decoded in all, and the most that were held or under way at once."""

    decoded: int = 0
    most_held: int = 0


@dataclass(eq=False)
class ChunkStream:
    """Blocks of one order, whose chunks are decoded a window at a time and `ahead` of it.

    Places must be asked for in rising order. What blocks give is valid until `settle`.

    Args:
        source: decodes chunks.
        order: of the blocks.
        executor: runs the decoding.
        ahead: chunks decoded beyond the present window.
        with_targets: False reads tokens only.
        count: is kept up to date.
    """

    source: BlockSource
    order: BlockOrder
    executor: Executor
    ahead: int
    with_targets: bool
    count: ChunkCount
    _number: int = -1
    _settled: int = -1
    _window: Window | None = None
    _chunk_of: list[ChunkRef] = field(default_factory=list)
    _tasks: dict[ChunkRef, Future[DecodedChunk]] = field(default_factory=dict)
    _results: list[Arena] = field(default_factory=list)
    _scratch: list[Arena] = field(default_factory=list)

    def block(self, place: int) -> BlockRows:
        """The block at a place of the endless sequence of epochs. Raises DamagedCacheError."""
        if self._window is None or not self._window.start <= place < self._window.stop:
            self._enter(self.order.window_of(place))
        assert self._window is not None
        index = place - self._window.start
        return self._tasks[self._chunk_of[index]].result().block(int(self._window.blocks[index]))

    def _enter(self, number: int) -> None:
        self._number, self._window = number, self.order.window(number)
        chunks = sorted(self._window.chunks, key=lambda ref: ref.first_block)
        owners = np.searchsorted([ref.first_block for ref in chunks], self._window.blocks, side="right") - 1
        self._chunk_of = [chunks[owner] for owner in owners.tolist()]
        self._submit(self._window.chunks)

    def settle(self) -> None:
        """Let go of the chunks of windows that have passed, and have those of coming ones decoded."""
        if self._window is None or self._settled == self._number:
            return
        self._settled = self._number
        coming = [ref for step in range(1, WINDOWS_AHEAD + 1) for ref in self.order.window(self._number + step).chunks]
        if self.ahead:
            self.source.prefetch(coming)
        ahead = [ref for ref in dict.fromkeys(coming) if ref not in self._window.chunks][: self.ahead]
        wanted = {*self._window.chunks, *ahead}
        for ref in [ref for ref in self._tasks if ref not in wanted]:
            self._release(self._tasks.pop(ref))
        self._submit(ahead)

    def _submit(self, chunks: Sequence[ChunkRef]) -> None:
        for ref in chunks:
            if ref not in self._tasks:
                self._tasks[ref] = self.executor.submit(self._decode, ref)
                self.count.decoded += 1
                self.count.most_held = max(self.count.most_held, len(self._tasks))

    def _decode(self, ref: ChunkRef) -> DecodedChunk:
        results, scratch = _taken(self._results), _taken(self._scratch)
        tokens, targets, counted = self.source.read(ref, ReusedMemory(results, scratch), self.with_targets)
        self._scratch.append(scratch)
        sizes = self.source.block_tokens(ref.first_block, ref.first_block + ref.num_blocks)
        return DecodedChunk(ref, tokens, targets, counted, offsets_of(sizes), results)

    def _release(self, task: Future[DecodedChunk]) -> None:
        """Give a chunk's memory to those to come, as soon as no thread writes to it."""
        if not task.cancel():
            task.add_done_callback(self._recycle)

    def _recycle(self, task: Future[DecodedChunk]) -> None:
        if task.exception() is None:
            self._results.append(task.result().arena)


def _taken(arenas: list[Arena]) -> Arena:
    """One that is free, or a new one. Taking from a list is atomic."""
    try:
        return arenas.pop()
    except IndexError:
        return Arena()
