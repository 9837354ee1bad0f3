"""The teacher's distributions at picked rows: as the cache should hold them, or under a suspicion of what went wrong.

Legend: M picked blocks of L tokens, n picked rows, D width of the hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.audit.picked import PickedRows
from logitcache.errors import ModelError
from logitcache.selection.distribution import Distribution
from logitcache.teachers.capture import LogitsTeacher


@dataclass(frozen=True)
class View:
    """Which of the teacher's rows a stored row is compared with.

    Args:
        prefix: a token put before every block, which the cache does not know of.
        dropped: tokens left out at each block's beginning.
        shift: a stored row of position t is compared with that of position t + shift.
    """

    prefix: int | None = None
    dropped: int = 0
    shift: int = 0

    @property
    def moved(self) -> int:
        """The teacher's row for the stored row 0."""
        return self.shift - self.dropped + (self.prefix is not None)

    def tokens(self, tokens_ML: NDArray[np.int64]) -> NDArray[np.int64]:
        """What the teacher is given for these blocks."""
        fed = tokens_ML[:, self.dropped :]
        return fed if self.prefix is None else np.insert(fed, 0, self.prefix, axis=1)


AS_STORED = View()


@torch.inference_mode()
def recompute(
    teacher: LogitsTeacher, picked: PickedRows, batch_blocks: int, view: View = AS_STORED
) -> Iterator[tuple[NDArray[np.int64], Distribution, torch.Tensor]]:
    """Rows int64 [m] of the n, their distributions, and their next tokens int64 [m] (-1 where there is none).

    To be consumed in inference mode: selections work in place. Memory is that of one batch's hidden states and of the
    logits of one slice.

    Args:
        teacher: the teacher.
        picked: n rows.
        batch_blocks: blocks in one forward pass.
        view: which of the teacher's rows; those that do not exist under it are left out.

    Raises:
        ModelError: a logit is NaN or infinite, or a token is none of the teacher's.
    """
    for first in range(0, len(picked.blocks), batch_blocks):
        fed = view.tokens(picked.tokens[first : first + batch_blocks])
        low, high = np.searchsorted(picked.block, [first, first + batch_blocks])
        rows = np.arange(low, high)
        place = picked.place[rows] + view.moved
        last = picked.lengths[picked.block[rows]] - view.dropped + (view.prefix is not None) - 1
        there = (place >= 0) & (place <= last)
        rows, place, last = rows[there], place[there], last[there]
        block = picked.block[rows] - first
        labels = np.where(place < last, fed[block, np.minimum(place + 1, fed.shape[1] - 1)], -1)
        hidden_mD = teacher.hidden(fed)[torch.from_numpy(block * fed.shape[1] + place).to(teacher.device)]
        for part in teacher.row_slices(rows.size):
            dist = Distribution.from_logits(teacher.finish(teacher.product(hidden_mD[part])))
            if not bool(torch.isfinite(dist.lse).all()):
                raise ModelError("the teacher's logits hold NaN or infinity; try --dtype float32")
            yield rows[part], dist, torch.from_numpy(labels[part]).to(teacher.device)
