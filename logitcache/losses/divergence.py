"""The divergences in closed form over gathered logits: a few lines of PyTorch on [N, K] tensors each.

Legend: N rows (token positions), K stored ids per row (the set S), +1 one more column for a label outside S.
All logarithms are natural; p is the student's softmax, q the stored weights, tau the teacher's mass outside S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from logitcache.losses.student import Student
from logitcache.targets import DeviceTargets

# Stands for -inf where -inf times a weight of 0 would be NaN; far below every logit, and its exp is 0.
FLOOR = -1e30


@dataclass(frozen=True, eq=False)
class Gathered:
    """Student and teacher side by side, in the working type, with padding made harmless.

    Args:
        student: the student's side.
        z_NK: logits at the stored ids, FLOOR at padding.
        log_p_NK: log p at the stored ids, 0 at padding.
        q_NK: weights, 0 at padding.
        tau_N: the teacher's mass outside S.
        entropy_N: the teacher's entropy in nats, NaN where unknown.
    """

    student: Student
    z_NK: torch.Tensor
    log_p_NK: torch.Tensor
    q_NK: torch.Tensor
    tau_N: torch.Tensor
    entropy_N: torch.Tensor


def gather_terms(student: Student, targets: DeviceTargets) -> Gathered:
    """Put the student's and the teacher's side together."""
    dtype = student.z_NK.dtype
    stored_NK = targets.ids >= 0
    return Gathered(
        student=student,
        z_NK=torch.where(stored_NK, student.z_NK, FLOOR),
        log_p_NK=torch.where(stored_NK, student.z_NK - student.lse_N[:, None], 0.0),
        q_NK=torch.where(stored_NK, targets.weights.to(dtype), 0.0),
        tau_N=targets.tail_mass.to(dtype),
        entropy_N=targets.entropy.to(dtype),
    )


def _partial_kl(weight: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """w (log w - log p), elementwise, 0 where w is 0."""
    return torch.special.xlogy(weight, weight) - weight * log_p


def unnormalised(g: Gathered, temperature: float) -> torch.Tensor:
    """sum over S of q (log q - log p): biased, its optimum is p = q / sum(q) with nothing outside S."""
    return _partial_kl(g.q_NK, g.log_p_NK).sum(dim=1)


def bucket(g: Gathered, temperature: float) -> torch.Tensor:
    """KL over the K stored ids and one class for the rest: unnormalised + tau (log tau - log P)."""
    # When S is the whole vocabulary, a tau above 0 is rounding, and there is no token it could belong to.
    has_tail_N = (g.tau_N > 0) & (g.student.log_rest_N > float("-inf"))
    log_rest_N = torch.where(has_tail_N, g.student.log_rest_N, 0.0)
    tau_N = torch.where(has_tail_N, g.tau_N, 0.0)
    return unnormalised(g, temperature) + _partial_kl(tau_N, log_rest_N)


def renormalised(g: Gathered, temperature: float) -> torch.Tensor:
    """KL(softmax_S(log q / T) || softmax_S(z / T)), in nats, without the factor T^2."""
    has_mass_N1 = (g.q_NK > 0).any(dim=1, keepdim=True)
    log_q_NK = torch.where(g.q_NK > 0, g.q_NK, 1.0).log()
    log_teacher_NK = torch.where(g.q_NK > 0, log_q_NK / temperature, FLOOR).log_softmax(dim=1)
    teacher_NK = torch.where(has_mass_N1, log_teacher_NK.exp(), 0.0)
    log_student_NK = (g.z_NK / temperature).log_softmax(dim=1)
    return _partial_kl(teacher_NK, log_student_NK).sum(dim=1)


def teacher_renormalised(g: Gathered, temperature: float) -> torch.Tensor:
    """sum over S of (q/m) (log (q/m) - log p), m = sum q: gradient p - q/m. Biased like `unnormalised`."""
    mass_N1 = g.q_NK.sum(dim=1, keepdim=True)
    return _partial_kl(g.q_NK / torch.where(mass_N1 > 0, mass_N1, 1.0), g.log_p_NK).sum(dim=1)


def label(g: Gathered, temperature: float) -> torch.Tensor:
    """Unnormalised KL with the teacher's missing mass added to the label's weight, whether the label is in S or not."""
    label_NK, log_p_label_N = g.student.label_NK, g.student.log_p_label_N
    assert label_NK is not None
    assert log_p_label_N is not None
    q_NK = g.q_NK + torch.where(label_NK, g.tau_N[:, None], 0.0)
    outside_N = torch.where(label_NK.any(dim=1), 0.0, g.tau_N)
    return _partial_kl(q_NK, g.log_p_NK).sum(dim=1) + _partial_kl(outside_N, log_p_label_N)


def unbiased(g: Gathered, temperature: float) -> torch.Tensor:
    """sum over S of w (-log p) - H(teacher): gradient (sum w) p - w, in expectation the full KL's (arXiv:2503.16870).

    Where the teacher's entropy is unknown the value is the cross entropy, with the same gradient. A single row's value
    may be negative; its expectation is the full KL.
    """
    entropy_N = torch.where(torch.isfinite(g.entropy_N), g.entropy_N, 0.0)
    return (g.q_NK * -g.log_p_NK).sum(dim=1) - entropy_N


DIVERGENCES: dict[str, Callable[[Gathered, float], torch.Tensor]] = {
    "bucket": bucket,
    "renormalised": renormalised,
    "teacher_renormalised": teacher_renormalised,
    "unnormalised": unnormalised,
    "label": label,
    "unbiased": unbiased,
}
