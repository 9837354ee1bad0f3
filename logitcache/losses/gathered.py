"""What a divergence is computed from: student and teacher side by side, at the ids that are read.

Legend: N rows (token positions), K stored ids per row (the set S).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from logitcache.losses.objective import Objective
from logitcache.losses.student import Student
from logitcache.targets import DeviceTargets

# Stands for -inf where -inf times a weight of 0 would be NaN; far below every logit, and its exp is 0.
FLOOR = -1e30


@dataclass(frozen=True, eq=False)
class Gathered:
    """Student and teacher side by side, in the working type, with padding made harmless.

    Args:
        student: the student's side.
        stored_NK: bool, False at padding.
        z_NK: logits at the stored ids, FLOOR at padding.
        log_p_NK: log p at the stored ids, 0 at padding.
        q_NK: weights, 0 at padding.
        threshold_N: weights above it are exact probabilities.
        tau_N: the teacher's mass outside S; outside the head for tail='blend'.
        entropy_N: the teacher's entropy in nats, NaN where unknown.
        label_logprob_N: the teacher's log-probability of the label in nats, NaN where unknown.
        blend: share of the unbiased term of tail='blend': a number, or a tensor, 0-dim or [N].
    """

    student: Student
    stored_NK: torch.Tensor
    z_NK: torch.Tensor
    log_p_NK: torch.Tensor
    q_NK: torch.Tensor
    threshold_N: torch.Tensor
    tau_N: torch.Tensor
    entropy_N: torch.Tensor
    label_logprob_N: torch.Tensor
    blend: float | torch.Tensor

    def exact_NK(self) -> torch.Tensor:
        """The weights that are exact probabilities, 0 elsewhere; NaN in rows that hold none, or do not say."""
        threshold_N1 = self.threshold_N.unsqueeze(1)
        exact_NK = torch.where(self.q_NK > threshold_N1, self.q_NK, 0.0)
        return exact_NK.masked_fill(self.stored_NK & threshold_N1.isinf(), torch.nan)


def read_by(objective: Objective, targets: DeviceTargets) -> DeviceTargets:
    """What the objective reads of the targets: their exact head, no ids at all, or everything."""
    if objective.reads_exact_head:
        return targets.exact_head()
    if objective.kind == "policy_gradient":
        return replace(targets, ids=targets.ids[:, :0], weights=targets.weights[:, :0])
    if objective.tail == "blend":
        return replace(targets, tail_mass=targets.exact_head().tail_mass)
    return targets


def gather_terms(student: Student, targets: DeviceTargets, blend: float | torch.Tensor = 0.5) -> Gathered:
    """Put the student's and the teacher's side together."""
    dtype = student.z_NK.dtype
    stored_NK = targets.ids >= 0
    q_NK = torch.where(stored_NK, targets.weights.to(dtype), 0.0)
    if isinstance(blend, torch.Tensor):
        blend = blend.to(device=q_NK.device, dtype=dtype)
    return Gathered(
        student=student,
        stored_NK=stored_NK,
        z_NK=torch.where(stored_NK, student.z_NK, FLOOR),
        log_p_NK=torch.where(stored_NK, student.z_NK - student.lse_N[:, None], 0.0),
        q_NK=q_NK,
        threshold_N=targets.threshold.to(dtype),
        tau_N=targets.tail_mass.to(dtype),
        entropy_N=targets.entropy.to(dtype),
        label_logprob_N=targets.label_logprob.to(dtype),
        blend=blend,
    )
