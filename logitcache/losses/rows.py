"""The rows of a batch as the losses see them: what to gather of the student, and the terms that follow from it.

Legend: N rows (token positions), D width, V rows of the head, K stored ids per row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from logitcache.kernels import GatherResult, HeadOptions, accumulation_dtype, check_head
from logitcache.losses.checks import (
    check_label_logprob,
    check_label_values,
    check_labels,
    check_share,
    device_targets,
    has_exact_head,
)
from logitcache.losses.divergence import divergence, gather_terms, read_by
from logitcache.losses.objective import Objective
from logitcache.losses.options import LossOptions
from logitcache.losses.student import ids_to_gather, student_of
from logitcache.losses.terms import DistillationTerms
from logitcache.targets import DeviceTargets, SparseTargets


@dataclass(frozen=True, eq=False)
class LossRows:
    """Checked rows of a batch.

    Args:
        options: how they are weighed; what differs by row has these rows.
        objective: the divergence.
        stored: what the objective reads of the targets; None when it reads none.
        label_N: the label, -1 where there is none; None when labels are not read.
        counted_N: bool, whether the row counts.
        with_ce: whether the cross entropy is asked for.
        dtype: type of the loss.
    """

    options: LossOptions
    objective: Objective
    stored: DeviceTargets | None
    label_N: torch.Tensor | None
    counted_N: torch.Tensor
    with_ce: bool
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
            options=self.options.slice(start, stop),
            stored=None if self.stored is None else self.stored.slice(start, stop),
            label_N=None if self.label_N is None else self.label_N[start:stop],
            counted_N=self.counted_N[start:stop],
        )

    def terms(self, result: GatherResult) -> DistillationTerms:
        """What the rows cost, from the primitive's results at `ids_to_gather`."""
        options = self.options
        student = student_of(result, self.stored_ids_NK, self.label_N)
        columns = {}
        if student.log_p_label_N is not None and (self.with_ce or self.stored is None):
            columns["ce"] = torch.where(self.counted_N, -student.log_p_label_N, 0.0)
        if self.stored is not None:
            gathered = gather_terms(student, self.stored, options.blend)
            divergence_N = divergence(gathered, self.objective, options.temperature)
            columns["divergence"] = torch.where(self.counted_N, divergence_N, 0.0)
        if options.z_loss != 0:
            columns["z_loss"] = torch.where(self.counted_N, options.z_loss * student.lse_N.square(), 0.0)
        return self.terms_of(columns)

    def terms_of(self, columns: dict[str, torch.Tensor]) -> DistillationTerms:
        """The terms of these rows from their columns [N]; those that are not there were not asked for."""
        ce_N, divergence_N, z_loss_N = (columns.get(name) for name in ("ce", "divergence", "z_loss"))
        return DistillationTerms(ce_N, divergence_N, self.counted_N, self.options.temperature, self.dtype, z_loss_N)


def prepare_rows(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    targets: SparseTargets | DeviceTargets | None,
    options: LossOptions,
    head: HeadOptions,
    with_ce: bool,
) -> LossRows:
    """Check everything that can be checked before the head runs; raises as `distillation_loss` says."""
    check_head(hidden_ND, weight_VD, head)
    check_labels(labels_N, hidden_ND)
    check_share("alpha", options.alpha, len(labels_N))
    check_share("blend", options.blend, len(labels_N))
    objective = options.effective_objective or Objective.default_for(bool(getattr(targets, "unbiased", False)))
    columns = head.columns(weight_VD)
    counted_N = labels_N != options.ignore_index
    stored = _what_is_read(targets, objective, options.temperature, hidden_ND, columns)
    label_N = None
    if with_ce or objective.reads_labels:
        check_label_values(labels_N, counted_N, columns)
        label_N = labels_N.masked_fill(~counted_N, -1)
    if stored is not None and objective.kind == "policy_gradient":
        check_label_logprob(stored, counted_N)
    dtype = accumulation_dtype(hidden_ND, weight_VD)
    return LossRows(options, objective, stored, label_N, counted_N, with_ce, dtype)


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
