"""Blocks of tokens with the teacher's rows, and how they are put together and taken apart.

Legend: B blocks, L block length, N = B * L rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
        counted: bool [B, L] of a masked cache: whether the position's next token is one to learn; its row is empty
            otherwise. None where all count.
    """

    first_block: int
    tokens: NDArray[np.int64]
    targets: SparseTargets
    valid: NDArray[np.bool_]
    counted: NDArray[np.bool_] | None = None

    def labels(self, ignore_index: int = -100) -> NDArray[np.int64]:
        """int64 [B, L]: each position's next token, `ignore_index` where the block has none or it does not count."""
        labels = np.full_like(self.tokens, ignore_index)
        wanted = self.valid[:, 1:] if self.counted is None else self.valid[:, 1:] & self.counted[:, :-1]
        labels[:, :-1] = np.where(wanted, self.tokens[:, 1:], ignore_index)
        return labels


@dataclass(frozen=True)
class ChunkRef:
    """A chunk's place: shard number, chunk number in it, and the blocks it holds."""

    shard: int
    chunk: int
    first_block: int
    num_blocks: int


def to_blocks(
    ref: ChunkRef,
    geometry: Geometry,
    tokens: NDArray[np.int64],
    targets: SparseTargets,
    counted: NDArray[np.bool_] | None = None,
) -> Blocks:
    """Stored rows at their places in their blocks: nothing stands where a block has ended."""
    counts = np.array(geometry.block_tokens(ref.first_block, ref.first_block + ref.num_blocks))
    valid = np.arange(geometry.block_length) < counts[:, None]
    if tokens.size < valid.size:
        targets = targets.spread(valid.ravel())
        tokens = _placed(tokens, valid)
        counted = None if counted is None else _placed(counted, valid)
    mask = None if counted is None else counted.reshape(valid.shape)
    return Blocks(ref.first_block, tokens.reshape(valid.shape), targets, valid, mask)


def _placed(values: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[Any]:
    """[B, L]: values of the real positions where these are, 0 elsewhere."""
    placed = np.zeros(valid.shape, dtype=values.dtype)
    placed[valid] = values
    return placed


def cut(blocks: Blocks, start: int, stop: int) -> Blocks:
    length = blocks.tokens.shape[1]
    return Blocks(
        blocks.first_block + start,
        blocks.tokens[start:stop],
        blocks.targets.slice(start * length, stop * length),
        blocks.valid[start:stop],
        None if blocks.counted is None else blocks.counted[start:stop],
    )


def join(parts: list[Blocks]) -> Blocks:
    if len(parts) == 1:
        return parts[0]
    return Blocks(
        parts[0].first_block,
        np.concatenate([part.tokens for part in parts]),
        SparseTargets.concatenate([part.targets for part in parts]),
        np.concatenate([part.valid for part in parts]),
        masks_of(parts),
    )


def masks_of(parts: Sequence[Blocks]) -> NDArray[np.bool_] | None:
    """bool [B, L]: the masks of all parts; None where none has one."""
    if all(part.counted is None for part in parts):
        return None
    return np.concatenate([part.valid if part.counted is None else part.counted for part in parts])
