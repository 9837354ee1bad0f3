"""Which function computes which objective: each a few lines of PyTorch on gathered logits, [N, K].

Legend: N rows (token positions), K stored ids per row (the set S).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from logitcache.losses import classes, forward_kl
from logitcache.losses.gathered import Gathered, gather_terms, read_by
from logitcache.losses.objective import CLASS_TAILS, Objective

__all__ = ["DIVERGENCES", "Gathered", "divergence", "gather_terms", "read_by"]

Divergence = Callable[[Gathered, Objective, float], torch.Tensor]


def mse(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """Mean square of z - log q over the stored ids with q > 0, less its mean there; in nats^2."""
    known_NK = g.stored_NK & (g.q_NK != 0)
    count_N1 = known_NK.sum(dim=1, keepdim=True).clamp(min=1)
    gap_NK = torch.where(known_NK, g.log_p_NK - torch.where(known_NK, g.q_NK, 1.0).log(), 0.0)
    mean_N1 = gap_NK.sum(dim=1, keepdim=True) / count_N1
    return torch.where(known_NK, gap_NK - mean_N1, 0.0).square().sum(dim=1) / count_N1.squeeze(1)


def policy_gradient(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """-A log p(label), A = log q(label) - log p(label), clipped and without a gradient."""
    log_p_N = g.student.log_p_label_N
    assert log_p_N is not None
    advantage_N = g.label_logprob_N - log_p_N.detach()
    if objective.clip is not None:
        advantage_N = advantage_N.clamp(-objective.clip, objective.clip)
    return -advantage_N * log_p_N


DIVERGENCES: dict[tuple[str, str | None], Divergence] = {
    ("forward_kl", "bucket"): forward_kl.bucket,
    ("forward_kl", "renormalised"): forward_kl.renormalised,
    ("forward_kl", "teacher_renormalised"): forward_kl.teacher_renormalised,
    ("forward_kl", "unnormalised"): forward_kl.unnormalised,
    ("forward_kl", "label"): forward_kl.label,
    ("forward_kl", "unbiased"): forward_kl.unbiased,
    ("forward_kl", "blend"): forward_kl.blend,
    **{("reverse_kl", tail): classes.reverse_kl for tail in CLASS_TAILS},
    **{("jsd", tail): classes.jsd for tail in CLASS_TAILS},
    **{("skew_kl", tail): classes.skew_kl for tail in CLASS_TAILS},
    **{("tvd", tail): classes.tvd for tail in CLASS_TAILS},
    ("decoupled", None): forward_kl.decoupled,
    ("mse", None): mse,
    ("policy_gradient", None): policy_gradient,
}


def divergence(gathered: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """[N] the objective's divergence in nats; times T^2 it is what enters the loss."""
    return DIVERGENCES[objective.kind, objective.tail](gathered, objective, temperature)
