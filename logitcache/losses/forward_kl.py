"""Forward KL divergences, KL(teacher || student), by what stands for the teacher's mass outside the stored ids.

Legend: N rows (token positions), K stored ids per row (the set S), +1 one more column for a label outside S.
All logarithms are natural; p is the student's softmax, q the stored weights, tau the teacher's mass outside S.
"""

from __future__ import annotations

import torch

from logitcache.losses.gathered import FLOOR, Gathered
from logitcache.losses.objective import Objective


def _partial_kl(weight: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """w (log w - log p), elementwise, 0 where w is 0."""
    return torch.special.xlogy(weight, weight) - weight * log_p


def _bucket_kl(
    q_NK: torch.Tensor, log_p_NK: torch.Tensor, tau_N: torch.Tensor, log_rest_N: torch.Tensor
) -> torch.Tensor:
    """sum of q (log q - log p) + tau (log tau - log P); a log P of -inf or FLOOR says that there is no such token."""
    # When S is the whole vocabulary, a tau above 0 is rounding, and there is no token it could belong to.
    has_tail_N = (tau_N > 0) & (log_rest_N > FLOOR / 2)
    log_rest_N = torch.where(has_tail_N, log_rest_N, 0.0)
    tau_N = torch.where(has_tail_N, tau_N, 0.0)
    return _partial_kl(q_NK, log_p_NK).sum(dim=1) + _partial_kl(tau_N, log_rest_N)


def unnormalised(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """sum over S of q (log q - log p): biased, its optimum is p = q / sum(q) with nothing outside S."""
    return _partial_kl(g.q_NK, g.log_p_NK).sum(dim=1)


def bucket(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """KL over the K stored ids and one class for the rest: unnormalised + tau (log tau - log P)."""
    return _bucket_kl(g.q_NK, g.log_p_NK, g.tau_N, g.student.log_rest_N)


def renormalised(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """KL(softmax_S(log q / T) || softmax_S(z / T)), in nats, without the factor T^2."""
    has_mass_N1 = (g.q_NK != 0).any(dim=1, keepdim=True)
    log_q_NK = torch.where(g.q_NK == 0, 1.0, g.q_NK).log()
    log_teacher_NK = torch.where(g.q_NK == 0, FLOOR, log_q_NK / temperature).log_softmax(dim=1)
    teacher_NK = torch.where(has_mass_N1, log_teacher_NK.exp(), 0.0)
    log_student_NK = (g.z_NK / temperature).log_softmax(dim=1)
    return _partial_kl(teacher_NK, log_student_NK).sum(dim=1)


def teacher_renormalised(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """sum over S of (q/m) (log (q/m) - log p), m = sum q: gradient p - q/m. Biased like `unnormalised`."""
    mass_N1 = g.q_NK.sum(dim=1, keepdim=True)
    return _partial_kl(g.q_NK / torch.where(mass_N1 > 0, mass_N1, 1.0), g.log_p_NK).sum(dim=1)


def label(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """Unnormalised KL with the teacher's missing mass added to the label's weight, whether the label is in S or not."""
    label_NK, log_p_label_N = g.student.label_NK, g.student.log_p_label_N
    assert label_NK is not None
    assert log_p_label_N is not None
    q_NK = g.q_NK + torch.where(label_NK, g.tau_N[:, None], 0.0)
    outside_N = torch.where(label_NK.any(dim=1), 0.0, g.tau_N)
    return _partial_kl(q_NK, g.log_p_NK).sum(dim=1) + _partial_kl(outside_N, log_p_label_N)


def unbiased(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """sum over S of w (-log p) - H(teacher): gradient (sum w) p - w, in expectation the full KL's (arXiv:2503.16870).

    Where the teacher's entropy is unknown the value is the cross entropy, with the same gradient. A single row's value
    may be negative; its expectation is the full KL.
    """
    entropy_N = torch.where(torch.isfinite(g.entropy_N), g.entropy_N, 0.0)
    return (g.q_NK * -g.log_p_NK).sum(dim=1) - entropy_N


def blend(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """(1 - blend) * bucket on the exact head + blend * unbiased, of one sample.

    The student's mass outside the head is that outside all ids plus that at the sampled ids: a sum of logarithms'
    exponentials, never 1 - p(head).
    """
    head_NK = g.exact_NK()
    sampled_NK = g.stored_NK & (head_NK == 0)
    log_sampled_N = torch.where(sampled_NK, g.log_p_NK, FLOOR).logsumexp(dim=1)
    log_rest_N = torch.logaddexp(g.student.log_rest_N, log_sampled_N)
    head_N = _bucket_kl(head_NK, g.log_p_NK, g.tau_N, log_rest_N)
    return (1 - g.blend) * head_N + g.blend * unbiased(g, objective, temperature)


def decoupled(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """KL(Bernoulli(m) || Bernoulli(1 - P)) / T^2 + m KL_T within S; the caller's factor T^2 undoes the division."""
    mass_N = g.q_NK.sum(dim=1)
    log_kept_N = torch.where(mass_N == 0, 0.0, _log_kept(g))
    bernoulli_N = _bucket_kl(mass_N[:, None], log_kept_N[:, None], g.tau_N, g.student.log_rest_N)
    return bernoulli_N / temperature**2 + mass_N * renormalised(g, objective, temperature)


def _log_kept(g: Gathered) -> torch.Tensor:
    """log(1 - P), the student's mass on S: from P where that is small, summed over S where it is not."""
    small_N = g.student.log_rest_N < -1
    from_rest_N = torch.log1p(-torch.where(small_N, g.student.log_rest_N, -1.0).exp())
    summed_N = torch.where(g.stored_NK, g.log_p_NK, FLOOR).logsumexp(dim=1)
    return torch.where(small_N, from_rest_N, summed_N)
