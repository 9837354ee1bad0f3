"""`varopt:K`: the exact head of a distribution and a variance-optimal sample of its tail.

Cohen, Duffield, Kaplan, Lund, Thorup, "Efficient stream sampling for variance-optimal estimation of subset sums"
(SIAM J. Comput. 40, 2011): of all unbiased estimates that keep K ids, this one has the least sum of variances.

Legend: n rows of one slice, V vocabulary, K entries kept, G groups of `GROUP` vocabulary columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.selection.distribution import Distribution, ascending, entries_of, largest
from logitcache.selection.draws import GROUP, LAST, Groups
from logitcache.selection.kept import Kept
from logitcache.targets import SparseTargets

# Ids whose probability is below the threshold by less than this share of it are kept for certain, at the threshold's
# weight: the float32 sum of a group is off by up to 6e-7 of itself, and such an id could otherwise be hit twice.
BORDER = 2.0**-19


def varopt(dist: Distribution, size: int, uniforms_n1: torch.Tensor) -> Kept:
    """Exactly K = `size` distinct ids a row: those above the row's threshold exactly, the others sampled.

    The threshold tau solves sum(min(1, p / tau)) = K. An id with p >= tau is kept with weight p; another is kept with
    probability p / tau and weight tau (systematic sampling: one uniform number a row). The weights sum to 1 and
    E[weight] = p.

    Args:
        dist: n distributions. `dist.probs` is changed for the time of the call, and then as it was: on a CPU a copy
            would take longer than all the rest.
        size: K, at most V.
        uniforms_n1: float64 [n, 1] in [0, 1).

    Returns:
        Unbiased SparseTargets to be; `threshold` is tau, and the weight of every sampled entry bit for bit. Where
        at most K ids have a probability above 0, all of them are exact and the threshold is 0.
    """
    top_nK = largest(dist.logits, size)
    probs_nK = dist.probs.gather(1, top_nK)
    try:
        sampled_nK, tau_n, weights_nK = _select(dist.probs, top_nK, probs_nK, uniforms_n1)
    finally:
        dist.probs.scatter_(1, top_nK, probs_nK)
    return Kept({"ids": sampled_nK, "weights": weights_nK, "threshold": tau_n}, _with_threshold, _in_order)


def _in_order(ids: torch.Tensor, weights: torch.Tensor, threshold: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**ascending(ids, weights), "threshold": threshold}


def _with_threshold(threshold: NDArray[np.float32], **entries: NDArray[Any]) -> SparseTargets:
    offsets, ids, weights = entries_of(**entries)
    return SparseTargets(offsets, ids, weights, threshold=threshold, unbiased=True)


def _select(
    probs_nV: torch.Tensor, top_nK: torch.Tensor, top_probs_nK: torch.Tensor, uniforms_n1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [n, K], threshold [n] and weights [n, K]; overwrites the `top_nK` of `probs_nV`."""
    # Sums of what lies outside the head are taken without it: 1 - head would lose the tail of a confident row.
    groups = Groups.of(probs_nV.scatter_(1, top_nK, 0))
    falling_nK = top_probs_nK.to(torch.float64)
    rest_n = groups.total()
    certain_n1, tau_n1 = _threshold(falling_nK, rest_n)
    slot_1K = torch.arange(top_nK.shape[1], device=top_nK.device).unsqueeze(0)
    certain_nK = slot_1K < certain_n1
    tail_nK = torch.where(certain_nK, 0, top_probs_nK)
    groups.probs.view(len(top_nK), -1).scatter_(1, top_nK, tail_nK)
    groups.sums.scatter_add_(1, top_nK // GROUP, tail_nK.to(torch.float64))

    # Aims at equal distances of tau: the rest of the row's mass, cut into as many parts as there are slots left.
    aims_nK = (slot_1K - certain_n1 + uniforms_n1) / (top_nK.shape[1] - certain_n1).clamp_min(1)
    ids_nK = torch.where(certain_nK, top_nK, groups.ids_at(aims_nK.clamp(0, LAST)))

    # The float32 softmax of a large vocabulary sums to 1 only within 1e-4.
    total_n1 = falling_nK.sum(1, keepdim=True) + rest_n.unsqueeze(1)
    tau_n1 = (tau_n1 / total_n1).to(torch.float32)
    weights_nK = torch.where(certain_nK, (falling_nK / total_n1).to(torch.float32).maximum(tau_n1), tau_n1)
    return ids_nK, tau_n1.squeeze(1), weights_nK


def _threshold(falling_nK: torch.Tensor, rest_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many ids are kept for certain, int64 [n, 1], and the threshold tau, float64 [n, 1].

    `falling_nK` are the K largest probabilities, `rest_n` the mass of all others, both float64. The head is the
    shortest beginning of the row after which no id is above its share of the mass left, tail / (K - head).
    """
    size = falling_nK.shape[1]
    tail_nK = rest_n.unsqueeze(1) + falling_nK.flip(1).cumsum(1).flip(1)
    share_nK = tail_nK / torch.arange(size, 0, -1, device=falling_nK.device)
    head_n1 = (falling_nK > share_nK).long().cumprod(1).sum(1, keepdim=True).clamp_max_(size - 1)
    tau_n1 = share_nK.gather(1, head_n1)
    # With nothing beyond the K largest, nothing is sampled; nor where tau would be 0 in float32.
    tau_n1 = torch.where((rest_n.unsqueeze(1) > 0) & (tau_n1.to(torch.float32) > 0), tau_n1, 0)
    return (falling_nK >= tau_n1 * (1 - BORDER)).sum(1, keepdim=True), tau_n1
