"""Every objective as its definition reads, row by row from dense probabilities in float64: ground truth for the tests.

Nothing here is shared with the kernels. Legend: N rows (token positions), V vocabulary, S the stored ids of a row.
"""

from __future__ import annotations

import torch

from logitcache.losses.objective import Objective
from logitcache.targets import DeviceTargets


def _kl(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """sum of q log(q / p) over the classes that q gives mass to."""
    keep = q > 0
    return (q[keep] * (q[keep].log() - p[keep].log())).sum()


def dense_row(
    logits_V: torch.Tensor, label: int, targets: DeviceTargets, row: int, objective: Objective, temperature: float
) -> torch.Tensor:
    """The divergence of one row in nats, without the factor T^2; float64 logits with every head option applied."""
    p_V = torch.softmax(logits_V / temperature, dim=0)
    stored = targets.ids[row] >= 0
    ids, q = targets.ids[row][stored], targets.weights[row][stored].double()
    tau = targets.tail_mass[row].double()
    outside_V = torch.ones(len(p_V), dtype=torch.bool)
    outside_V[ids] = False
    zero = 0.0 * logits_V.sum()
    if objective.kind == "cross_entropy":
        return -p_V[label].log()
    if objective.tail == "bucket":
        return zero + _kl(q, p_V[ids]) + _kl(tau[None], p_V[outside_V].sum()[None])
    if objective.tail == "renormalised":
        if q.sum() == 0:
            return zero
        heated = q ** (1 / temperature)
        return _kl(heated / heated.sum(), p_V[ids] / p_V[ids].sum())
    if objective.tail == "unnormalised":
        return zero + _kl(q, p_V[ids])
    if objective.tail == "teacher_renormalised":
        return zero + _kl(q / q.sum(), p_V[ids]) if q.sum() > 0 else zero
    if objective.tail == "label":
        q_V = torch.zeros_like(p_V).index_add(0, ids, q).index_add(0, torch.tensor([label]), tau[None])
        return _kl(q_V, p_V)
    entropy = targets.entropy[row].double()
    return -(q * p_V[ids].log()).sum() - (0 if torch.isnan(entropy) else entropy)


def dense_loss(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    targets: DeviceTargets,
    objective: Objective,
    alpha: float | torch.Tensor = 0.9,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """[N] losses: (1 - alpha) * CE + alpha * T^2 * divergence, and 0 on ignored rows."""
    alpha_N = torch.as_tensor(alpha, dtype=torch.float64).expand(len(labels_N))
    rows = []
    for row, label in enumerate(labels_N.tolist()):
        if label == ignore_index:
            rows.append(0.0 * logits_NV[row].sum())
            continue
        ce = -torch.log_softmax(logits_NV[row], dim=0)[label]
        divergence = dense_row(logits_NV[row], label, targets, row, objective, temperature)
        rows.append((1 - alpha_N[row]) * ce + alpha_N[row] * temperature**2 * divergence)
    return torch.stack(rows)
