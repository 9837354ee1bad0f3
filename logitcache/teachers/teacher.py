"""What a dump needs of a teacher: blocks of token ids in, sparse rows out. Torch-free.

Legend: B blocks of L tokens, R real rows (positions before the corpus' end).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from logitcache.selection import Selection
from logitcache.targets import SparseTargets

# What becomes of a row whose numbers are NaN or infinite.
Nonfinite = Literal["fail", "mask"]
# Rows of a batch that may still be under way; called, by any thread, it waits for them.
PendingRows = Callable[[], list[SparseTargets]]


@dataclass(frozen=True, eq=False)
class BlockBatch:
    """Consecutive blocks, and what is wanted of a teacher's distributions there.

    Args:
        tokens_BL: int64 [B, L]; positions from `num_rows` on (row-major) are padding.
        first_block: number of the first block; together with `seed` it determines what is sampled.
        num_rows: R.
        selections: what to keep; each gives one SparseTargets of R rows.
        seed: of the sampled selections.
        counted_BL: bool [B, L], positions that rows are wanted of; the others' rows are empty. None: all.
        nonfinite: "fail" raises where the teacher's numbers are NaN or infinite; with "mask" such a row is empty, and
            its label_logprob NaN, which that of a row with a next token otherwise never is.
    """

    tokens_BL: NDArray[np.int64]
    first_block: int
    num_rows: int
    selections: Sequence[Selection]
    seed: int
    counted_BL: NDArray[np.bool_] | None = None
    nonfinite: Nonfinite = "fail"

    @property
    def counted_R(self) -> NDArray[np.bool_]:
        """bool [R], positions that rows are wanted of; a copy."""
        if self.counted_BL is None:
            return np.ones(self.num_rows, dtype=bool)
        return self.counted_BL.reshape(-1)[: self.num_rows].copy()


class Teacher(Protocol):
    """A teacher. `TransformersTeacher` runs a model here, `ServerTeacher` asks a server.

    Attributes:
        tokenizer: makes the corpus' tokens.
        vocab_size: V, ids of a distribution; every id that is kept is below it.
        blocks_at_once: it is at its best with so many blocks or more.
    """

    tokenizer: Any
    vocab_size: int
    blocks_at_once: int

    def identity(self) -> dict[str, Any]:
        """What determines the teacher's numbers, ready for JSON."""

    def check_selections(self, selections: Sequence[Selection]) -> None:
        """Raise UsageError or ModelError if these cannot be had of this teacher."""

    def check_block_length(self, block_length: int) -> None:
        """Raise UsageError, or a server's ModelError, if blocks of so many tokens do not fit into the context."""

    def expect_batches(self, blocks: int) -> None:
        """Most batches have so many blocks from now on: whoever prepares for that may."""

    def begin_rows(self, batch: BlockBatch) -> PendingRows:
        """The teacher's distributions at the positions of `batch`, to be called for them; meanwhile the next can begin.

        Raises, here or when it is called:
            ModelError: there are no rows to be had; the message names block and position, or the server.
        """
