"""The rows of a batch as the losses see them: what to gather of the student, and the terms that follow from it.

Legend: N rows (token positions), D width, V rows of the head, K stored ids per row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from logitcache.errors import ObjectiveError
from logitcache.kernels import GatherResult, HeadOptions, accumulation_dtype, check_head
from logitcache.losses.checks import (
    check_label_logprob,
    check_label_values,
    check_labels,
    check_share,
    check_z_loss,
    device_targets,
    has_exact_head,
)
from logitcache.losses.divergence import divergence, gather_terms, read_by
from logitcache.losses.objective import Objective
from logitcache.losses.student import ids_to_gather, student_of
from logitcache.losses.terms import DistillationTerms
from logitcache.targets import DeviceTargets, SparseTargets


@dataclass(frozen=True, eq=False)
class LossRows:
    """Checked rows of a batch.

    Args:
        objective: what is minimised.
        stored: what the objective reads of the targets; None when it reads none.
        label_N: the label, -1 where there is none; None when labels are not read.
        counted_N: bool, whether the row counts.
        temperature, with_ce, blend, z_loss: as in `distillation_terms`.
        dtype: type of the loss.
    """

    objective: Objective
    stored: DeviceTargets | None
    label_N: torch.Tensor | None
    counted_N: torch.Tensor
    temperature: float
    with_ce: bool
    blend: float | torch.Tensor
    z_loss: float
    dtype: torch.dtype

    @property
    def stored_ids_NK(self) -> torch.Tensor:
        """The ids that the objective reads, -1 at padding."""
        if self.stored is not None:
            return self.stored.ids
        return self.counted_N.new_empty((len(self.counted_N), 0), dtype=torch.int64)

    @property
    def ids_to_gather(self) -> torch.Tensor:
        """The ids whose logits are needed: those and, in a column of its own, a label that is not among them."""
        return ids_to_gather(self.stored_ids_NK, self.label_N)

    def slice(self, start: int, stop: int) -> LossRows:
        """The rows [start, stop)."""
        return replace(
            self,
            stored=None if self.stored is None else self.stored.slice(start, stop),
            label_N=None if self.label_N is None else self.label_N[start:stop],
            counted_N=self.counted_N[start:stop],
            blend=of_rows(self.blend, start, stop),
        )

    def terms(self, result: GatherResult) -> DistillationTerms:
        """What the rows cost, from the primitive's results at `ids_to_gather`."""
        student = student_of(result, self.stored_ids_NK, self.label_N)
        ce_N = divergence_N = z_loss_N = None
        if student.log_p_label_N is not None and (self.with_ce or self.stored is None):
            ce_N = torch.where(self.counted_N, -student.log_p_label_N, 0.0)
        if self.stored is not None:
            gathered = gather_terms(student, self.stored, self.blend)
            divergence_N = divergence(gathered, self.objective, self.temperature)
            divergence_N = torch.where(self.counted_N, divergence_N, 0.0)
        if self.z_loss != 0:
            z_loss_N = torch.where(self.counted_N, self.z_loss * student.lse_N.square(), 0.0)
        return DistillationTerms(ce_N, divergence_N, self.counted_N, self.temperature, self.dtype, z_loss_N)


def of_rows(value: float | torch.Tensor, start: int, stop: int) -> float | torch.Tensor:
    """A number, or the rows [start, stop) of one number per row."""
    return value[start:stop] if isinstance(value, torch.Tensor) and value.ndim else value


def prepare_rows(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    targets: SparseTargets | DeviceTargets | None,
    objective: Objective | None,
    temperature: float,
    head: HeadOptions,
    ignore_index: int,
    with_ce: bool,
    blend: float | torch.Tensor,
    z_loss: float,
) -> LossRows:
    """Check everything that can be checked before the head runs; raises as `distillation_loss` says."""
    check_head(hidden_ND, weight_VD, head)
    check_labels(labels_N, hidden_ND)
    objective = objective or Objective.default_for(bool(getattr(targets, "unbiased", False)))
    if not isinstance(objective, Objective):
        raise ObjectiveError(f"objective is {objective!r}; build one, for example Objective.forward_kl(tail='bucket')")
    check_share("blend", blend, len(labels_N))
    check_z_loss(z_loss)
    columns = head.columns(weight_VD)
    stored = _what_is_read(targets, objective, temperature, hidden_ND, columns)
    counted_N = labels_N != ignore_index
    label_N = None
    if with_ce or objective.reads_labels:
        check_label_values(labels_N, counted_N, columns)
        label_N = labels_N.masked_fill(~counted_N, -1)
    if stored is not None and objective.kind == "policy_gradient":
        check_label_logprob(stored, counted_N)
    dtype = accumulation_dtype(hidden_ND, weight_VD)
    return LossRows(objective, stored, label_N, counted_N, temperature, with_ce, blend, z_loss, dtype)


def _what_is_read(
    targets: SparseTargets | DeviceTargets | None,
    objective: Objective,
    temperature: float,
    hidden_ND: torch.Tensor,
    columns: int,
) -> DeviceTargets | None:
    """The part of the targets that the objective reads, on hidden's device; None for cross entropy."""
    if not objective.reads_targets:
        objective.check(False, temperature)
        return None
    stored = device_targets(targets, hidden_ND, columns)
    objective.check(stored.unbiased, temperature, has_exact_head=has_exact_head(stored))
    return read_by(objective, stored)
