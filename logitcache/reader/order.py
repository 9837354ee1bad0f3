"""The order in which blocks are read: a pure function of (cache fingerprint, seed, epoch). Torch-free.

Shards are permuted, chunks are permuted within a window of shards, blocks within a window of chunks, so that reading
stays chunk-wise while blocks are mixed. Only raw Philox output is used, whose values numpy guarantees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from logitcache.store import ChunkRef

SHARDS_PER_WINDOW = 4
CHUNKS_PER_WINDOW = 8


@dataclass(frozen=True, eq=False)
class BlockOrder:
    """Reading order of the blocks of one cache.

    Args:
        fingerprint: of the cache.
        chunks: all chunks of the cache.
        first_block, stop_block: only blocks in [first_block, stop_block) are read.
        seed: of the permutations.
    """

    fingerprint: str
    chunks: Sequence[ChunkRef]
    first_block: int
    stop_block: int
    seed: int

    @property
    def num_blocks(self) -> int:
        """Blocks of one epoch."""
        return self.stop_block - self.first_block

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """int64 [num_blocks]: every block once, in the order of this epoch."""
        shards = sorted({chunk.shard for chunk in self.chunks})
        of_shard: dict[int, list[ChunkRef]] = {shard: [] for shard in shards}
        for chunk in self.chunks:
            of_shard[chunk.shard].append(chunk)
        stream = self._stream(epoch)
        shards = [shards[index] for index in _permutation(stream, len(shards))]
        chunks: list[ChunkRef] = []
        for start in range(0, len(shards), SHARDS_PER_WINDOW):
            window = [chunk for shard in shards[start : start + SHARDS_PER_WINDOW] for chunk in of_shard[shard]]
            chunks += [window[index] for index in _permutation(stream, len(window))]
        parts = []
        for start in range(0, len(chunks), CHUNKS_PER_WINDOW):
            blocks = np.concatenate(
                [
                    np.arange(chunk.first_block, chunk.first_block + chunk.num_blocks)
                    for chunk in chunks[start : start + CHUNKS_PER_WINDOW]
                ]
            )
            parts.append(blocks[_permutation(stream, blocks.size)])
        order = np.concatenate(parts)
        return order[(order >= self.first_block) & (order < self.stop_block)]

    def samples(self, start: int, count: int) -> NDArray[np.int64]:
        """int64 [count]: the blocks at places [start, start + count) of the endless sequence of epochs."""
        picked: list[NDArray[np.int64]] = []
        while count > 0:
            epoch, place = divmod(start, self.num_blocks)
            blocks = _recent_epoch(self, epoch)[place : place + count]
            picked.append(blocks)
            start, count = start + blocks.size, count - blocks.size
        return np.concatenate(picked) if picked else np.zeros(0, dtype=np.int64)

    def _stream(self, epoch: int) -> np.random.Philox:
        key = hashlib.sha256(f"{self.fingerprint}/{self.seed}/{epoch}".encode()).digest()
        return np.random.Philox(key=int.from_bytes(key[:16], "little"))


@lru_cache(maxsize=4)
def _recent_epoch(order: BlockOrder, epoch: int) -> NDArray[np.int64]:
    return order.epoch(epoch)


def _permutation(stream: np.random.Philox, size: int) -> NDArray[np.intp]:
    return np.argsort(stream.random_raw(size), kind="stable") if size else np.zeros(0, dtype=np.intp)
