"""Divergences over a few classes: the stored ids and a bucket for the rest, or the stored ids renormalised.

Legend: N rows (token positions), K stored ids per row (the set S), C classes: K + 1 with a bucket, K without.
All logarithms are natural; p is the student, q the teacher, m a mixture of the two. With b for a class and phi for the
divergence, the gradient in the student's logits is p_b (a_b - sum of p a), a_b = d phi / d p_b: docs/objectives.md
lists a_b for each of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from logitcache.losses.gathered import FLOOR, Gathered
from logitcache.losses.objective import Objective

# What a teacher's probability of 0 is read as where a divergence would be infinite: float32's unit roundoff, about what
# rounding can take from the tail of a confident row.
ROUNDED_TO_ZERO = 2.0**-24


@dataclass(frozen=True, eq=False)
class Classes:
    """Both distributions over the same C classes. Classes that do not exist (padding) have p = q = 0 and log_p = 0.

    Args:
        p_NC, log_p_NC: the student.
        q_NC, log_q_NC: the teacher; log_q is FLOOR where q is 0.
        log_zero_N1: log of ROUNDED_TO_ZERO as a class's probability in this row.
    """

    p_NC: torch.Tensor
    log_p_NC: torch.Tensor
    q_NC: torch.Tensor
    log_q_NC: torch.Tensor
    log_zero_N1: torch.Tensor

    @property
    def log_q_read_NC(self) -> torch.Tensor:
        """log q, with ROUNDED_TO_ZERO for q = 0."""
        return torch.where(self.q_NC == 0, self.log_zero_N1, self.log_q_NC)


def _classes(g: Gathered, tail: str | None, temperature: float) -> Classes:
    return _bucket(g) if tail == "bucket" else _renormalised(g, temperature)


def _bucket(g: Gathered) -> Classes:
    """The stored ids and one class for all other tokens, if there are any."""
    log_rest_N1 = g.student.log_rest_N[:, None]
    exists_NC = torch.cat([g.stored_NK, log_rest_N1 > -math.inf], dim=1)
    log_p_NC = torch.where(exists_NC, torch.cat([g.log_p_NK, log_rest_N1], dim=1), 0.0)
    q_NC = torch.where(exists_NC, torch.cat([g.q_NK, g.tau_N[:, None]], dim=1), 0.0)
    log_zero_N1 = torch.full_like(log_rest_N1, math.log(ROUNDED_TO_ZERO))
    return Classes(torch.where(exists_NC, log_p_NC.exp(), 0.0), log_p_NC, q_NC, _log(q_NC), log_zero_N1)


def _renormalised(g: Gathered, temperature: float) -> Classes:
    """softmax_S(z / T) and softmax_S(log q / T). A row whose ids all have q = 0 has no classes: nothing is known."""
    exists_NK = g.stored_NK & (g.q_NK != 0).any(dim=1, keepdim=True)
    log_p_NK = torch.where(exists_NK, (g.z_NK / temperature).log_softmax(dim=1), 0.0)
    heated_NK = torch.where(g.q_NK == 0, FLOOR, _log(g.q_NK) / temperature)
    log_sum_N1 = heated_NK.logsumexp(dim=1, keepdim=True)
    log_q_NK = torch.where(g.q_NK == 0, FLOOR, heated_NK - log_sum_N1)
    log_zero_N1 = math.log(ROUNDED_TO_ZERO) / temperature - log_sum_N1
    return Classes(torch.where(exists_NK, log_p_NK.exp(), 0.0), log_p_NK, log_q_NK.exp(), log_q_NK, log_zero_N1)


def _log(q: torch.Tensor) -> torch.Tensor:
    """log q, FLOOR where q is 0."""
    return torch.where(q == 0, FLOOR, torch.where(q == 0, 1.0, q).log())


def _kl(a: torch.Tensor, log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """[N] sum over classes of a (log a - log b)."""
    return (a * (log_a - log_b)).sum(dim=1)


def _log_mixture(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
    """log(share * a + (1 - share) * b), for a share in [0, 1)."""
    if share == 0:
        return log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def reverse_kl(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """KL(p || q), with q = 0 read as ROUNDED_TO_ZERO."""
    c = _classes(g, objective.tail, temperature)
    return _kl(c.p_NC, c.log_p_NC, c.log_q_read_NC)


def jsd(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p."""
    assert objective.beta is not None
    c = _classes(g, objective.tail, temperature)
    log_m_NC = _log_mixture(c.log_q_NC, c.log_p_NC, objective.beta)
    teacher_N, student_N = _kl(c.q_NC, c.log_q_NC, log_m_NC), _kl(c.p_NC, c.log_p_NC, log_m_NC)
    return objective.beta * teacher_N + (1 - objective.beta) * student_N


def skew_kl(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """KL(q || beta q + (1 - beta) p), or KL(p || beta p + (1 - beta) q) when reversed."""
    assert objective.beta is not None
    c = _classes(g, objective.tail, temperature)
    if not objective.reverse:
        return _kl(c.q_NC, c.log_q_NC, _log_mixture(c.log_q_NC, c.log_p_NC, objective.beta))
    log_q_NC = c.log_q_read_NC if objective.beta == 0 else c.log_q_NC
    return _kl(c.p_NC, c.log_p_NC, _log_mixture(c.log_p_NC, log_q_NC, objective.beta))


def tvd(g: Gathered, objective: Objective, temperature: float) -> torch.Tensor:
    """Half the sum of |q - p|."""
    c = _classes(g, objective.tail, temperature)
    return 0.5 * (c.q_NC - c.p_NC).abs().sum(dim=1)
