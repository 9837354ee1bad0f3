"""Distributions in, sparse rows out, on the device where the logits are.

Legend: n rows of one slice, V vocabulary, K entries kept, G groups of `GROUP` vocabulary columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.selection.spec import Selection
from logitcache.targets import SparseTargets

# Columns summed together before drawing: a draw first picks a group, then a column in it, so that only
# V + draws * GROUP numbers are summed instead of a float64 running sum over all V.
GROUP = 128
# Columns of which the largest is taken before searching the top K.
TOP_GROUP = 64


@dataclass
class Distribution:
    """Teacher distributions of n positions.

    Args:
        logits: float32 [n, V]; -inf marks an impossible id.
        probs: float32 [n, V], softmax of the logits.
        peak: float32 [n], the largest logit.
        log_sum: float32 [n], log(sum(exp(logits - peak))), in [0, log V]. Kept apart from `peak`: beside a logit of
            100,000 their sum would lose what it says.
    """

    logits: torch.Tensor
    probs: torch.Tensor
    peak: torch.Tensor
    log_sum: torch.Tensor

    @classmethod
    def from_logits(cls, logits_nV: torch.Tensor) -> Distribution:
        """Build from float32 logits. `lse` is not finite where a row has no softmax; the caller checks."""
        probs_nV = torch.softmax(logits_nV, -1)
        # The largest probability is 1 / sum(exp(z - max)): the logsumexp without another pass of exponentials.
        return cls(logits_nV, probs_nV, logits_nV.amax(-1), -probs_nV.amax(-1).log())

    @property
    def lse(self) -> torch.Tensor:
        """float32 [n], logsumexp of the logits; not finite where a row holds NaN or +inf, or -inf only."""
        return self.peak + self.log_sum

    def entropy(self) -> torch.Tensor:
        """float32 [n], nats: log_sum + peak - sum p z, where 0 * -inf counts as 0."""
        expected_n = torch.linalg.vecdot(self.probs, self.logits)
        if bool(expected_n.isnan().any()):
            floor = torch.finfo(torch.float32).min / 4
            expected_n = torch.linalg.vecdot(self.probs, self.logits.clamp(min=floor))
        return (self.log_sum + (self.peak - expected_n)).clamp_min_(0)

    def label_logprob(self, labels_n: torch.Tensor) -> torch.Tensor:
        """float32 [n], nats; NaN where the label is negative."""
        picked = self.logits.gather(1, labels_n.clamp_min(0).unsqueeze(1)).squeeze(1)
        return torch.where(labels_n >= 0, (picked - self.peak) - self.log_sum, torch.nan)


def select(selection: Selection, dist: Distribution, uniforms: NDArray[np.float64] | None = None) -> SparseTargets:
    """Keep what `selection` says of each row.

    Args:
        selection: what to keep.
        dist: n distributions.
        uniforms: float64 [n, draws] from `block_uniforms`; only for sampled selections.

    Returns:
        SparseTargets of n rows on the CPU, without label_logprob and entropy. Entries of probability 0 are left out.
    """
    if selection.method == "sample":
        assert uniforms is not None
        draws_nK = draw(dist.probs, torch.from_numpy(uniforms).to(dist.probs.device))
        return count_draws(draws_nK.cpu().numpy())
    return _most_probable(selection, dist)


def draw(probs_nV: torch.Tensor, uniforms_nK: torch.Tensor) -> torch.Tensor:
    """Ids drawn with replacement by inverting the cumulative distribution: int64 [n, K].

    `uniforms_nK` is float64 in [0, 1). Running sums are float64: an id's chance is its float32 probability to
    about 1e-7 of itself.
    """
    rows, vocab = probs_nV.shape
    if vocab % GROUP:
        probs_nV = torch.nn.functional.pad(probs_nV, (0, -vocab % GROUP))
    grouped_nGg = probs_nV.view(rows, -1, GROUP)
    edges_nG = grouped_nGg.sum(-1).to(torch.float64).cumsum(-1)
    aim_nK = uniforms_nK * edges_nG[:, -1:]
    group_nK = torch.searchsorted(edges_nG, aim_nK, right=True).clamp_max_(edges_nG.shape[1] - 1)
    below_nK = torch.where(group_nK > 0, edges_nG.gather(1, (group_nK - 1).clamp_min(0)), 0.0)
    share_nK = (aim_nK - below_nK) / (edges_nG.gather(1, group_nK) - below_nK)
    # Both differences may round to the same number; a share of 1 would step past the group's last possible id.
    share_nK.clamp_max_(1 - 2.0**-53)

    row_n1 = torch.arange(rows, device=probs_nV.device).unsqueeze(1)
    inner_nKg = grouped_nGg[row_n1, group_nK].to(torch.float64).cumsum(-1)
    aim_inside = (share_nK * inner_nKg[..., -1]).unsqueeze(-1)
    column_nK = torch.searchsorted(inner_nKg, aim_inside, right=True).squeeze(-1).clamp_max_(GROUP - 1)
    return group_nK * GROUP + column_nK


def count_draws(draws_nK: NDArray[np.int64]) -> SparseTargets:
    """Distinct ids of each row with weight count / K."""
    ordered = np.sort(draws_nK, axis=1)
    first = np.ones(ordered.shape, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(first)
    counts = np.diff(starts, append=ordered.size)
    offsets = np.concatenate([[0], np.cumsum(first.sum(1))])
    return SparseTargets(offsets, ordered.ravel()[starts], counts / np.float32(draws_nK.shape[1]), unbiased=True)


def largest(logits_nV: torch.Tensor, size: int) -> torch.Tensor:
    """Ids of the `size` largest logits, falling: int64 [n, size]. Of equal logits at the border any may be kept.

    The largest K numbers lie in the K groups with the largest maxima, so only those groups are searched: twice as
    fast as `torch.topk` over a whole vocabulary.
    """
    rows, vocab = logits_nV.shape
    if size * TOP_GROUP * 2 > vocab:
        return torch.topk(logits_nV, size, dim=-1).indices
    whole = vocab - vocab % TOP_GROUP
    grouped_nGg = logits_nV[:, :whole].view(rows, -1, TOP_GROUP)
    group_nK = torch.topk(grouped_nGg.amax(-1), size, dim=-1, sorted=False).indices
    members_nKg = grouped_nGg.gather(1, group_nK.unsqueeze(-1).expand(-1, -1, TOP_GROUP))
    ids_nKg = (group_nK * TOP_GROUP).unsqueeze(-1) + torch.arange(TOP_GROUP, device=logits_nV.device)
    # The columns that fill no group are always searched.
    rest_nr = torch.arange(whole, vocab, device=logits_nV.device).expand(rows, -1)
    candidates_nC = torch.cat([members_nKg.flatten(1), logits_nV[:, whole:]], 1)
    ids_nC = torch.cat([ids_nKg.flatten(1), rest_nr], 1)
    return ids_nC.gather(1, torch.topk(candidates_nC, size, dim=-1).indices)


def _most_probable(selection: Selection, dist: Distribution) -> SparseTargets:
    ids_nK = largest(dist.logits, selection.size)
    weights_nK = dist.probs.gather(1, ids_nK)
    keep_nK = weights_nK > 0
    if selection.mass is not None:
        before_nK = weights_nK.cumsum(1, dtype=torch.float64) - weights_nK
        keep_nK &= before_nK < selection.mass
    tail_n = 1 - torch.where(keep_nK, weights_nK, 0).sum(1, dtype=torch.float64)

    absent = dist.logits.shape[1]
    order_nK = torch.where(keep_nK, ids_nK, absent).argsort(1)
    kept = keep_nK.gather(1, order_nK).cpu().numpy()
    ids, weights = ids_nK.gather(1, order_nK).cpu().numpy(), weights_nK.gather(1, order_nK).cpu().numpy()
    offsets = np.concatenate([[0], np.cumsum(kept.sum(1))])
    return SparseTargets(offsets, ids[kept], weights[kept], tail_mass=tail_n.clamp(0, 1).cpu().numpy())
