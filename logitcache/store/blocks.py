"""Blocks of tokens with the teacher's rows, and how they are put together and taken apart.

Legend: B blocks, L block length, N = B * L rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.store.schema import Geometry
from logitcache.targets import SparseTargets


@dataclass(frozen=True)
class Blocks:
    """B consecutive blocks.

    Args:
        first_block: number of the first one.
        tokens: int64 [B, L]; 0 where a block has ended: the corpus' last one, or any short block.
        targets: SparseTargets of N = B * L rows, row-major; rows after a block's end are empty.
        valid: bool [B, L]; False where a block has ended.
    """

    first_block: int
    tokens: NDArray[np.int64]
    targets: SparseTargets
    valid: NDArray[np.bool_]

    def labels(self, ignore_index: int = -100) -> NDArray[np.int64]:
        """int64 [B, L]: the next token of each position, `ignore_index` where there is none in the block."""
        labels = np.full_like(self.tokens, ignore_index)
        labels[:, :-1] = np.where(self.valid[:, 1:], self.tokens[:, 1:], ignore_index)
        return labels


@dataclass(frozen=True)
class ChunkRef:
    """A chunk's place: shard number, chunk number in it, and the blocks it holds."""

    shard: int
    chunk: int
    first_block: int
    num_blocks: int


def to_blocks(ref: ChunkRef, geometry: Geometry, tokens: NDArray[np.int64], targets: SparseTargets) -> Blocks:
    """Stored rows at their places in their blocks: nothing stands where a block has ended."""
    counts = np.array(geometry.block_tokens(ref.first_block, ref.first_block + ref.num_blocks))
    valid = np.arange(geometry.block_length) < counts[:, None]
    if tokens.size < valid.size:
        place = np.where(valid, np.cumsum(valid).reshape(valid.shape) - 1, tokens.size).ravel()
        empty = SparseTargets([0, 0], [], [], unbiased=targets.unbiased)
        targets = SparseTargets.concatenate([targets, empty]).take(place)
        tokens = np.append(tokens, 0)[place]
    return Blocks(ref.first_block, tokens.reshape(valid.shape), targets, valid)


def cut(blocks: Blocks, start: int, stop: int) -> Blocks:
    length = blocks.tokens.shape[1]
    return Blocks(
        blocks.first_block + start,
        blocks.tokens[start:stop],
        blocks.targets.slice(start * length, stop * length),
        blocks.valid[start:stop],
    )


def join(parts: list[Blocks]) -> Blocks:
    if len(parts) == 1:
        return parts[0]
    return Blocks(
        parts[0].first_block,
        np.concatenate([part.tokens for part in parts]),
        SparseTargets.concatenate([part.targets for part in parts]),
        np.concatenate([part.valid for part in parts]),
    )
