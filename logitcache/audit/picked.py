"""Which rows of a cache are looked at: random ones of random blocks, and more of those where blocks begin.

Legend: M picked blocks of L tokens, n picked rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import CacheError
from logitcache.store import Cache
from logitcache.targets import SparseTargets

# A forward pass costs a whole block, so that many rows of each are looked at, but half of them at most: a fault may
# sit in few blocks.
ROWS_PER_BLOCK, LEAST_BLOCKS = 128, 8
# A BOS that is missing, or that nobody asked for, shows where a block begins and fades after that.
START_POSITIONS, START_SHARE = 16, 8


@dataclass(frozen=True, eq=False)
class PickedRows:
    """n rows of a cache, block after block.

    Args:
        blocks: int64 [M], numbers of the blocks, ascending.
        tokens: int64 [M, L]; 0 where a block has ended.
        lengths: int64 [M], real tokens of each block.
        block: int64 [n], index of each row's block among the M.
        place: int64 [n], position in it.
        targets: the n rows as they are stored.
    """

    blocks: NDArray[np.int64]
    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]
    block: NDArray[np.int64]
    place: NDArray[np.int64]
    targets: SparseTargets

    def __len__(self) -> int:
        return self.block.size

    @property
    def at_start(self) -> NDArray[np.bool_]:
        """bool [n]: rows among the first `START_POSITIONS` of their block."""
        return self.place < START_POSITIONS

    def rows_of(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64: which of the n rows lie in some of the blocks, given by their indices among the M, ascending."""
        return np.flatnonzero(np.isin(self.block, blocks))

    def of_blocks(self, blocks: NDArray[np.int64]) -> PickedRows:
        """Those rows alone."""
        rows = self.rows_of(blocks)
        return PickedRows(
            self.blocks[blocks],
            self.tokens[blocks],
            self.lengths[blocks],
            np.searchsorted(blocks, self.block[rows]),
            self.place[rows],
            self.targets.take(rows),
        )

    @classmethod
    def of(cls, cache: Cache, rows: int, seed: int) -> PickedRows:
        """Random rows, all where the cache has no more; the same ones for the same seed.

        Raises:
            CacheError: nothing is stored yet.
            DamagedCacheError: a block cannot be read.
        """
        there = [np.arange(chunk.first_block, chunk.first_block + chunk.num_blocks) for chunk in cache.chunks]
        stored = np.concatenate([np.arange(0), *there])
        if not stored.size:
            raise CacheError(f"{cache.location} holds no rows yet; run the same dump again to finish it")
        rng = np.random.default_rng(seed)
        order = rng.permutation(stored)
        count = max(LEAST_BLOCKS, -(-rows // min(ROWS_PER_BLOCK, -(-cache.block_length // 2))))
        places = _places(cache, order[:count])
        while sum(of_block.size for of_block in places) < rows and count < stored.size:
            places += _places(cache, order[count : 2 * count])  # blocks were short, or little of them counts
            count *= 2
        pairs = zip(order.tolist(), places, strict=False)
        by_number = sorted((pair for pair in pairs if pair[1].size), key=lambda pair: pair[0])
        if not by_number:
            raise CacheError(f"{cache.location} holds no rows yet; run the same dump again to finish it")
        blocks = np.array([number for number, _ in by_number])
        lengths = _lengths(cache, blocks)
        block, place = _choose([of_block for _, of_block in by_number], rows, rng)
        parts, tokens = [], []
        for number, first in enumerate(blocks.tolist()):
            read = cache.read_blocks(first, first + 1)
            tokens.append(read.tokens[0])
            parts.append(read.targets.take(place[block == number]))
        return cls(blocks, np.stack(tokens), lengths, block, place, SparseTargets.concatenate(parts))


def _lengths(cache: Cache, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    geometry = cache.manifest.identity.geometry
    return np.array([geometry.tokens_in(block, block + 1) for block in blocks.tolist()])


def _places(cache: Cache, blocks: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Positions of each block that have a row: of a masked cache those that count."""
    if not cache.masked:
        return [np.arange(length) for length in _lengths(cache, blocks).tolist()]
    masks = [cache.read_blocks(block, block + 1).counted for block in blocks.tolist()]
    return [np.flatnonzero(mask) for mask in masks if mask is not None]


def _choose(
    places: list[NDArray[np.int64]], rows: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Block index and place of `rows` rows, one in `START_SHARE` of them from the first positions of blocks."""
    block = np.repeat(np.arange(len(places)), [of_block.size for of_block in places])
    place = np.concatenate(places)
    order = rng.permutation(block.size)
    start = place[order] < START_POSITIONS
    of_start = min(max(1, rows // START_SHARE), int(start.sum()))
    # What one part lacks the other gives.
    inside = order[~start][: rows - of_start]
    chosen = np.sort(np.concatenate([inside, order[start][: rows - inside.size]]))
    return block[chosen], place[chosen]
