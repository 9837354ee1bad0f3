"""Blocks without their padding, and what every export target's writer does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from logitcache.store import Blocks
from logitcache.targets import SparseTargets, offsets_of

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class RealRows:
    """The R real positions of B blocks, in order.

    Args:
        starts: int64 [B + 1]; block b's positions are [starts[b], starts[b + 1]).
        block, position: int64 [R], number of the block and place in it.
        tokens: int64 [R].
        labels: int64 [R], the next token; -100 where there is none.
        targets: SparseTargets of R rows.
        counted: bool [R], whether the next token is one to learn; None in a cache without a mask.
    """

    starts: NDArray[np.int64]
    block: NDArray[np.int64]
    position: NDArray[np.int64]
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    targets: SparseTargets
    counted: NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, blocks: Blocks) -> RealRows:
        """Leave out the positions after a block's end; their rows are empty."""
        valid = blocks.valid
        block, position = np.nonzero(valid)
        return cls(
            starts=offsets_of(valid.sum(axis=1)),
            block=block + blocks.first_block,
            position=position,
            tokens=blocks.tokens[valid],
            labels=blocks.labels()[valid],
            targets=blocks.targets.take(np.flatnonzero(valid)),
            counted=None if blocks.counted is None else blocks.counted[valid],
        )

    def __len__(self) -> int:
        return self.tokens.size


class Writer(Protocol):
    """Turns rows into Arrow tables of one schema."""

    def schema(self) -> pa.Schema:
        """The columns."""

    def table(self, rows: RealRows) -> pa.Table:
        """The rows of some blocks."""

    def columns(self) -> dict[str, str]:
        """What each column holds, in a few words."""

    def side_files(self) -> dict[str, str]:
        """Further text files: name -> content."""

    def notes(self) -> str:
        """A sentence or two for the folder's README."""
