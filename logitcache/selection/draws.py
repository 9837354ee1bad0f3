"""Random draws from rows of probabilities by inverting their cumulative distributions.

Legend: n rows of one slice, V vocabulary, K draws, G groups of `GROUP` vocabulary columns (g within one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.selection.distribution import Distribution
from logitcache.selection.kept import Kept
from logitcache.targets import SparseTargets, offsets_of

# Columns summed together before drawing: a draw first picks a group, then a column in it, so that only
# V + draws * GROUP numbers are summed instead of a float64 running sum over all V.
GROUP = 128
# The largest number below 1: an aim of 1 would step past the last possible id.
LAST = 1 - 2.0**-53


@dataclass
class Groups:
    """Rows of probabilities, not necessarily normalised, in groups of columns.

    Running sums are float64: an id's chance is its float32 probability to about 1e-7 of itself.

    Args:
        probs: float32 [n, G, GROUP].
        sums: float64 [n, G], the mass of each group.
    """

    probs: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def of(cls, probs_nV: torch.Tensor) -> Groups:
        """A view of `probs_nV`, or a padded copy where the last group is not full."""
        rows, vocab = probs_nV.shape
        if vocab % GROUP:
            probs_nV = torch.nn.functional.pad(probs_nV, (0, -vocab % GROUP))
        probs_nGg = probs_nV.view(rows, -1, GROUP)
        return cls(probs_nGg, probs_nGg.sum(-1).to(torch.float64))

    def total(self) -> torch.Tensor:
        """float64 [n], the mass of each row."""
        return self.sums.sum(-1)

    def ids_at(self, aims_nK: torch.Tensor) -> torch.Tensor:
        """Ids whose stretch of the cumulative distribution holds the aims: int64 [n, K].

        `aims_nK` is float64 in [0, 1), a share of the row's mass. An id of probability 0 is never hit.
        """
        edges_nG = self.sums.cumsum(-1)
        aim_nK = aims_nK * edges_nG[:, -1:]
        group_nK = torch.searchsorted(edges_nG, aim_nK, right=True).clamp_max_(edges_nG.shape[1] - 1)
        below_nK = torch.where(group_nK > 0, edges_nG.gather(1, (group_nK - 1).clamp_min(0)), 0.0)
        share_nK = (aim_nK - below_nK) / (edges_nG.gather(1, group_nK) - below_nK)
        # Both differences may round to the same number; a share of 1 would step past the group's last possible id.
        return group_nK * GROUP + self._column_at(group_nK, share_nK.clamp_max_(LAST))

    def _column_at(self, group_nK: torch.Tensor, share_nK: torch.Tensor) -> torch.Tensor:
        """The column in each group that holds a share of the group's mass: int64 [n, K]."""
        row_n1 = torch.arange(len(group_nK), device=group_nK.device).unsqueeze(1)
        if group_nK.shape[1] < self.sums.shape[1]:
            chosen_nKg, slot_nK = self.probs[row_n1, group_nK], torch.arange(group_nK.shape[1], device=group_nK.device)
        else:
            # More draws than groups: summing every group once takes less time and memory than one for each draw.
            chosen_nKg, slot_nK = self.probs, group_nK
        inner_nKg = chosen_nKg.to(torch.float64).cumsum(-1)
        aim_nK = share_nK * inner_nKg[row_n1, slot_nK, -1]
        column_nK = torch.zeros_like(group_nK)
        step = GROUP // 2
        while step:
            # Binary search for the first running sum above the aim.
            passed_nK = inner_nKg[row_n1, slot_nK, column_nK + (step - 1)] <= aim_nK
            column_nK += step * passed_nK
            step //= 2
        return column_nK


def mass_outside(dist: Distribution, ids_nK: torch.Tensor, probs_nK: torch.Tensor) -> torch.Tensor:
    """float64 [n]: the mass of all ids but these, whose probabilities are `probs_nK`.

    Summed without them: 1 - head would lose the tail of a confident row. `dist.probs` is changed for the time of the
    call, and then as it was: on a CPU a copy would take longer than the sum.
    """
    try:
        return Groups.of(dist.probs.scatter_(1, ids_nK, 0)).total()
    finally:
        dist.probs.scatter_(1, ids_nK, probs_nK)


def draw(probs_nV: torch.Tensor, uniforms_nK: torch.Tensor) -> torch.Tensor:
    """Ids drawn with replacement, int64 [n, K], one for each float64 number in [0, 1)."""
    return Groups.of(probs_nV).ids_at(uniforms_nK)


def count_draws(draws: NDArray[Any], ratios: NDArray[np.float64] | None = None) -> SparseTargets:
    """Distinct ids of each row of draws [n, K] with weight count / K, times the draws' `ratios` [n, K] = p / q.

    An id's draws have one ratio. A weight too small for float32 is left out.
    """
    size = draws.shape[1]
    if ratios is None:
        ordered = np.sort(draws, axis=1)
    else:
        order = np.argsort(draws, axis=1)
        ordered, ratios = (np.take_along_axis(array, order, 1) for array in (draws, ratios))
    first = np.ones(ordered.shape, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(first)
    weights = np.diff(starts, append=ordered.size) / np.float32(size)
    offsets, ids = offsets_of(first.sum(1)), ordered.ravel()[starts]
    if ratios is not None:
        weights = (weights.astype(np.float32) * ratios.ravel()[starts]).astype(np.float32)
        kept = weights > 0
        offsets, ids, weights = offsets_of(kept)[offsets], ids[kept], weights[kept]
    return SparseTargets(offsets, ids, weights, unbiased=True)


def sample(dist: Distribution, uniforms_nK: torch.Tensor, exponent: float | None = None) -> Kept:
    """`sample:N` and `sample:N:T`: K = N draws with replacement from q ~ p^T, weights count / N * p / q.

    Args:
        dist: n distributions.
        uniforms_nK: float64 [n, K] in [0, 1).
        exponent: T; None for 1, where the weights are count / N.

    Returns:
        Unbiased SparseTargets to be. A weight too small for float32 is left out.
    """
    if exponent is None:
        return Kept({"draws": draw(dist.probs, uniforms_nK).to(torch.int32)}, count_draws)
    proposal = (dist.logits - dist.peak.unsqueeze(1)).mul_(exponent).exp_()
    groups = Groups.of(proposal)
    draws_nK = groups.ids_at(uniforms_nK)
    # The draws inverted these very numbers, rounded as they are, so these are what the weights must undo.
    scale_n1 = (groups.total() / Groups.of(dist.probs).total()).unsqueeze(1)
    ratios_nK = dist.probs.gather(1, draws_nK) / proposal.gather(1, draws_nK).to(torch.float64) * scale_n1
    return Kept({"draws": draws_nK.to(torch.int32), "ratios": ratios_nK}, count_draws)
