"""The order in which blocks are read: a pure function of (cache fingerprint, seed, epoch, index). Torch-free.

Shards are permuted, chunks are permuted within a window of shards, blocks within a window of chunks, so that reading
stays chunk-wise while blocks are mixed. Only raw Philox output is used, whose values numpy guarantees. Any window is
found without making those before it, so that neither time nor memory to resume depends on the cache's size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from logitcache.store import ChunkRef

SHARDS_PER_WINDOW = 4
CHUNKS_PER_WINDOW = 8
# Philox makes its 64-bit numbers four at a time, and skips ahead in such steps.
NUMBERS_PER_STEP = 4
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Window:
    """Blocks that are mixed with each other: those of a few chunks.

    Args:
        start: place of its first block in the endless sequence of epochs.
        chunks: the chunks that hold them.
        blocks: int64 [n], in the order in which they are read.
    """

    start: int
    chunks: tuple[ChunkRef, ...]
    blocks: Ints

    @property
    def stop(self) -> int:
        return self.start + self.blocks.size


@dataclass(frozen=True, eq=False)
class BlockOrder:
    """Reading order of the blocks of one cache, or of several with the same blocks.

    Args:
        fingerprint: of the cache.
        chunks: all chunks of the cache.
        first_block, stop_block: only blocks in [first_block, stop_block) are read.
        seed: of the permutations.
        shuffled: False for blocks in the order in which they are stored.
    """

    fingerprint: str
    chunks: Sequence[ChunkRef]
    first_block: int
    stop_block: int
    seed: int
    shuffled: bool = True

    @property
    def num_blocks(self) -> int:
        """Blocks of one epoch."""
        return self.stop_block - self.first_block

    @property
    def num_windows(self) -> int:
        """Windows of one epoch; one may hold no block that is read."""
        return -(-len(self.chunks) // CHUNKS_PER_WINDOW)

    def window(self, number: int) -> Window:
        """The `number`-th window, counted over all epochs."""
        return _recent_window(self, number)

    def window_of(self, place: int) -> int:
        """Number of the window that holds the block at a place of the endless sequence of epochs."""
        epoch, rest = divmod(place, self.num_blocks)
        starts = _recent_plan(self, epoch).starts
        return epoch * self.num_windows + int(np.searchsorted(starts, rest, side="right")) - 1

    def epoch(self, epoch: int) -> Ints:
        """int64 [num_blocks]: every block once, in the order of this epoch."""
        first = epoch * self.num_windows
        return np.concatenate([self.window(first + index).blocks for index in range(self.num_windows)])

    def samples(self, start: int, count: int) -> Ints:
        """int64 [count]: the blocks at places [start, start + count) of the endless sequence of epochs."""
        picked: list[Ints] = []
        while count > 0:
            window = self.window(self.window_of(start))
            blocks = window.blocks[start - window.start :][:count]
            picked.append(blocks)
            start, count = start + blocks.size, count - blocks.size
        return np.concatenate(picked) if picked else np.zeros(0, dtype=np.int64)

    def _stream(self, epoch: int, skipped: int = 0) -> np.random.Philox:
        """The epoch's random numbers after the first `skipped`."""
        key = hashlib.sha256(f"{self.fingerprint}/{self.seed}/{epoch}".encode()).digest()
        stream = np.random.Philox(key=int.from_bytes(key[:16], "little"))
        stream.advance(skipped // NUMBERS_PER_STEP)
        stream.random_raw(skipped % NUMBERS_PER_STEP)
        return stream

    def _permutation(self, stream: np.random.Philox, size: int) -> NDArray[np.intp]:
        if not self.shuffled or not size:
            return np.arange(size)
        return np.argsort(stream.random_raw(size), kind="stable")

    def _plan(self, epoch: int) -> _Plan:
        shards = np.array([chunk.shard for chunk in self.chunks])
        bounds = np.flatnonzero(np.diff(shards, prepend=-1, append=-1))
        of_shard = [np.arange(first, stop) for first, stop in pairwise(bounds)]
        stream = self._stream(epoch)
        order = self._permutation(stream, len(of_shard))
        parts = []
        for start in range(0, order.size, SHARDS_PER_WINDOW):
            window = np.concatenate([of_shard[index] for index in order[start : start + SHARDS_PER_WINDOW]])
            parts.append(window[self._permutation(stream, window.size)])
        chunks = np.concatenate(parts)
        first = np.array([chunk.first_block for chunk in self.chunks])[chunks]
        sizes = np.array([chunk.num_blocks for chunk in self.chunks])[chunks]
        wanted = np.minimum(first + sizes, self.stop_block) - np.maximum(first, self.first_block)
        return _Plan(
            chunks,
            starts=_before_windows(np.maximum(wanted, 0)),
            drawn=order.size + chunks.size + _before_windows(sizes),
        )

    def _window(self, number: int) -> Window:
        epoch, index = divmod(number, self.num_windows)
        plan = _recent_plan(self, epoch)
        picked = plan.chunks[index * CHUNKS_PER_WINDOW : (index + 1) * CHUNKS_PER_WINDOW]
        chunks = [self.chunks[place] for place in picked]
        blocks = np.concatenate([np.arange(ref.first_block, ref.first_block + ref.num_blocks) for ref in chunks])
        blocks = blocks[self._permutation(self._stream(epoch, int(plan.drawn[index])), blocks.size)]
        blocks = blocks[(blocks >= self.first_block) & (blocks < self.stop_block)]
        there = tuple(
            ref
            for ref in chunks
            if ref.first_block < self.stop_block and ref.first_block + ref.num_blocks > self.first_block
        )
        return Window(epoch * self.num_blocks + int(plan.starts[index]), there, blocks)


@dataclass(frozen=True, eq=False)
class _Plan:
    """The windows of one epoch.

    Args:
        chunks: int64, numbers of all chunks in their order; a window takes the next few.
        starts: int64 [windows], blocks read before each window.
        drawn: int64 [windows], random numbers drawn before each window.
    """

    chunks: Ints
    starts: Ints
    drawn: Ints


@lru_cache(maxsize=8)
def _recent_plan(order: BlockOrder, epoch: int) -> _Plan:
    return order._plan(epoch)


@lru_cache(maxsize=16)
def _recent_window(order: BlockOrder, number: int) -> Window:
    return order._window(number)


def _before_windows(sizes: Ints) -> Ints:
    """What the chunks before each window sum to."""
    return (np.cumsum(sizes) - sizes)[::CHUNKS_PER_WINDOW]
