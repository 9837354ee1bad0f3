"""Which rows of a cache are looked at: random ones of random blocks, and more of those where blocks begin.

Of a cache with a mask only rows that count are looked at.

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
        masks = _masks(cache, order[:count])
        while sum(int(mask.sum()) for mask in masks) < rows and count < stored.size:
            # Blocks were short, or little of them counts.
            masks += _masks(cache, order[count : 2 * count])
            count *= 2
        ascending = [number for number in np.argsort(order[:count]).tolist() if masks[number].any()]
        if not ascending:
            raise CacheError(f"{cache.location} holds no row that counts; there is nothing to compare")
        blocks = order[ascending]
        lengths = _lengths(cache, blocks)
        block, place = _choose([masks[number] for number in ascending], rows, rng)
        parts, tokens = [], []
        for number, first in enumerate(blocks.tolist()):
            read = cache.read_blocks(first, first + 1)
            tokens.append(read.tokens[0])
            parts.append(read.targets.take(place[block == number]))
        return cls(blocks, np.stack(tokens), lengths, block, place, SparseTargets.concatenate(parts))


def _lengths(cache: Cache, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    geometry = cache.manifest.identity.geometry
    return np.array([geometry.tokens_in(block, block + 1) for block in blocks.tolist()])


def _masks(cache: Cache, blocks: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
    """bool [real tokens] of each block: the rows that count."""
    if not cache.masked:
        return [np.ones(length, dtype=bool) for length in _lengths(cache, blocks).tolist()]
    geometry, masks = cache.manifest.identity.geometry, []
    for block in blocks.tolist():
        ref = cache.chunk_of(block)
        counted, first = cache.read_counted(ref), geometry.tokens_in(ref.first_block, block)
        assert counted is not None  # the cache has a mask
        masks.append(counted[first : first + geometry.tokens_in(block, block + 1)])
    return masks


def _choose(
    masks: list[NDArray[np.bool_]], rows: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Block index and place of `rows` rows, one in `START_SHARE` of them from the first positions of blocks."""
    block = np.repeat(np.arange(len(masks)), [int(mask.sum()) for mask in masks])
    place = np.concatenate([np.flatnonzero(mask) for mask in masks])
    order = rng.permutation(block.size)
    start = place[order] < START_POSITIONS
    of_start = min(max(1, rows // START_SHARE), int(start.sum()))
    # What one part lacks the other gives.
    inside = order[~start][: rows - of_start]
    chosen = np.sort(np.concatenate([inside, order[start][: rows - inside.size]]))
    return block[chosen], place[chosen]
