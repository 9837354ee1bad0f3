"""Every objective as its definition reads, row by row from dense probabilities in float64: ground truth for the tests.

Nothing here is shared with the kernels or the closed forms. Legend: N rows (token positions), V vocabulary, S the
stored ids of a row, C classes.
"""

from __future__ import annotations

import math

import torch

from logitcache.losses.objective import Objective
from logitcache.targets import DeviceTargets


def _kl(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """sum of q log(q / p) over the classes that q gives mass to."""
    keep = q > 0
    return (q[keep] * (q[keep].log() - p[keep].log())).sum()


class _Row:
    """One row: probabilities of the student over the vocabulary, the teacher's stored entries and scalars."""

    def __init__(self, logits_V: torch.Tensor, label: int, targets: DeviceTargets, row: int) -> None:
        stored = targets.ids[row] >= 0
        self.logits_V, self.label = logits_V, label
        self.ids, self.q = targets.ids[row][stored], targets.weights[row][stored].double()
        self.tau, self.entropy = targets.tail_mass[row].double(), targets.entropy[row].double()
        self.threshold, self.label_logprob = targets.threshold[row].double(), targets.label_logprob[row].double()
        self.zero = 0.0 * logits_V.sum()

    def p_V(self, temperature: float = 1.0) -> torch.Tensor:
        return torch.softmax(self.logits_V / temperature, dim=0)

    def bucket(self, q: torch.Tensor, ids: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Teacher and student over `ids` and one class for all other tokens, if there are any."""
        p_V = self.p_V()
        outside_V = torch.ones(len(p_V), dtype=torch.bool)
        outside_V[ids] = False
        if not outside_V.any():
            return q, p_V[ids]
        return torch.cat([q, tau[None]]), torch.cat([p_V[ids], p_V[outside_V].sum()[None]])

    def renormalised(self, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides on S, at a temperature; no classes at all where the teacher gave S nothing."""
        if self.q.sum() == 0:
            return self.q[:0], self.q[:0]
        heated, p_S = self.q ** (1 / temperature), self.p_V(temperature)[self.ids]
        return heated / heated.sum(), p_S / p_S.sum()


def _over_classes(q: torch.Tensor, p: torch.Tensor, objective: Objective, zero: torch.Tensor) -> torch.Tensor:
    """reverse_kl, jsd, skew_kl and tvd over classes; `zero` is what a q of 0 is read as."""
    read = torch.where(q == 0, zero, q)
    beta = 0.0 if objective.beta is None else objective.beta
    if objective.kind == "reverse_kl":
        return _kl(p, read)
    if objective.kind == "tvd":
        return (q - p).abs().sum() / 2
    if objective.kind == "jsd":
        mixture = beta * q + (1 - beta) * p
        return beta * _kl(q, mixture) + (1 - beta) * _kl(p, mixture)
    if not objective.reverse:
        return _kl(q, beta * q + (1 - beta) * p)
    return _kl(p, (1 - beta) * (read if beta == 0 else q) + beta * p)


def _forward_kl(row: _Row, tail: str | None, temperature: float, blend: torch.Tensor) -> torch.Tensor:
    p_V, ids, q = row.p_V(temperature), row.ids, row.q
    if tail == "bucket":
        return _kl(*row.bucket(q, ids, row.tau))
    if tail == "renormalised":
        return _kl(*row.renormalised(temperature))
    if tail == "unnormalised":
        return _kl(q, p_V[ids])
    if tail == "teacher_renormalised":
        return _kl(q / q.sum(), p_V[ids]) if q.sum() > 0 else row.zero
    if tail == "label":
        label = torch.tensor([row.label])
        return _kl(torch.zeros_like(p_V).index_add(0, ids, q).index_add(0, label, row.tau[None]), p_V)
    whole = -(q * p_V[ids].log()).sum() - (0 if torch.isnan(row.entropy) else row.entropy)
    if tail == "unbiased":
        return whole
    head = q > row.threshold
    # What is not in the head, as the targets' own float32 says it.
    tau = q[~head].sum().clamp(max=1).float().double()
    return (1 - blend) * _kl(*row.bucket(q[head], ids[head], tau)) + blend * whole


def _decoupled(row: _Row, temperature: float) -> torch.Tensor:
    """The Bernoulli part at temperature 1 counts once, the other one T^2 times: the whole of it is divided by T^2."""
    q, p = row.bucket(row.q, row.ids, row.tau)
    kept = torch.arange(len(q)) < len(row.ids)
    binary = _kl(torch.stack([q[kept].sum(), q[~kept].sum()]), torch.stack([p[kept].sum(), p[~kept].sum()]))
    return (binary + row.q.sum() * temperature**2 * _kl(*row.renormalised(temperature))) / temperature**2


def _mse(row: _Row) -> torch.Tensor:
    known = row.q > 0
    if not known.any():
        return row.zero
    gap = row.logits_V[row.ids[known]] - row.q[known].log()
    return ((gap - gap.mean()) ** 2).mean()


def _policy_gradient(row: _Row, clip: float | None) -> torch.Tensor:
    log_p = row.p_V()[row.label].log()
    bound = math.inf if clip is None else clip
    return -max(-bound, min(bound, float(row.label_logprob - log_p.detach()))) * log_p


def dense_row(
    logits_V: torch.Tensor,
    label: int,
    targets: DeviceTargets,
    row: int,
    objective: Objective,
    temperature: float,
    blend: torch.Tensor,
) -> torch.Tensor:
    """The divergence of one row in nats, without the factor T^2; float64 logits with every head option applied."""
    one = _Row(logits_V, label, targets, row)
    if objective.kind == "cross_entropy":
        return -one.p_V()[label].log()
    if objective.kind == "forward_kl":
        return one.zero + _forward_kl(one, objective.tail, temperature, blend)
    if objective.kind == "decoupled":
        return one.zero + _decoupled(one, temperature)
    if objective.kind == "mse":
        return one.zero + _mse(one)
    if objective.kind == "policy_gradient":
        return _policy_gradient(one, objective.clip)
    unread = torch.tensor(2.0**-24, dtype=torch.float64)
    if objective.tail == "bucket":
        return one.zero + _over_classes(*one.bucket(one.q, one.ids, one.tau), objective, unread)
    heated = unread ** (1 / temperature) / (one.q ** (1 / temperature)).sum()
    return one.zero + _over_classes(*one.renormalised(temperature), objective, heated)


def dense_loss(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    targets: DeviceTargets,
    objective: Objective,
    alpha: float | torch.Tensor = 0.9,
    temperature: float = 1.0,
    ignore_index: int = -100,
    blend: float | torch.Tensor = 0.5,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """[N] losses: (1 - alpha) * CE + alpha * T^2 * divergence + z_loss * lse^2, and 0 on ignored rows."""
    alpha_N, blend_N = (torch.as_tensor(x, dtype=torch.float64).expand(len(labels_N)) for x in (alpha, blend))
    rows = []
    for row, label in enumerate(labels_N.tolist()):
        if label == ignore_index:
            rows.append(0.0 * logits_NV[row].sum())
            continue
        ce = -torch.log_softmax(logits_NV[row], dim=0)[label]
        divergence = dense_row(logits_NV[row], label, targets, row, objective, temperature, blend_N[row])
        mixed = (1 - alpha_N[row]) * ce + alpha_N[row] * temperature**2 * divergence
        rows.append(mixed + z_loss * logits_NV[row].exp().sum().log() ** 2)
    return torch.stack(rows)
