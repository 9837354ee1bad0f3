"""Per-row cross entropy and divergence from one pass over the head, and how they become one loss.

Legend: N rows (token positions), D width, V rows of the head, K stored ids per row, +1 the label's own column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from logitcache.errors import ObjectiveError
from logitcache.kernels import HeadOptions, accumulation_dtype, check_head
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
from logitcache.losses.objective import Objective, check_alpha
from logitcache.losses.student import gather_student
from logitcache.targets import DeviceTargets, SparseTargets

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True, eq=False)
class DistillationTerms:
    """What one batch of N rows costs, before it is mixed and reduced. Values are nats, 0 on rows that do not count.

    Args:
        ce: [N] cross entropy on the label at temperature 1; None when it was not asked for.
        divergence: [N] divergence from the teacher at `temperature`, without the factor T^2; None for a pure
            cross-entropy objective.
        counted: bool [N], False where the label is ignore_index.
        temperature: T.
        dtype: type of the loss.
        z_loss: [N] the coefficient of the z-loss times lse^2, which is added to the mix; None when there is none.
    """

    ce: torch.Tensor | None
    divergence: torch.Tensor | None
    counted: torch.Tensor
    temperature: float
    dtype: torch.dtype
    z_loss: torch.Tensor | None = None

    def loss(
        self,
        alpha: float | torch.Tensor = 0.9,
        reduction: str = "mean",
        normalizer: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(1 - alpha) * ce + alpha * T^2 * divergence + z_loss, reduced; see `distillation_loss`."""
        check_reduction(reduction, normalizer)
        return reduce_rows(self.rows(alpha), self.counted, reduction, normalizer).to(self.dtype)

    def rows(self, alpha: float | torch.Tensor = 0.9) -> torch.Tensor:
        """[N] the mixed loss of each row. Of a term with weight exactly 0 (a Python number) nothing enters."""
        check_alpha(alpha)
        mixed_N = self._mixed(alpha)
        return mixed_N if self.z_loss is None else mixed_N + self.z_loss

    def _mixed(self, alpha: float | torch.Tensor) -> torch.Tensor:
        if self.divergence is None or (not isinstance(alpha, torch.Tensor) and alpha == 0):
            return self._need(self.ce, "cross entropy")
        divergence_N = self.divergence * self.temperature**2
        if not isinstance(alpha, torch.Tensor) and alpha == 1:
            return divergence_N
        if isinstance(alpha, torch.Tensor):
            if alpha.ndim != 0 and alpha.shape != self.counted.shape:
                raise ObjectiveError(f"alpha has shape {tuple(alpha.shape)}; it must be a number or one per row")
            alpha = alpha.to(device=divergence_N.device, dtype=divergence_N.dtype)
        return (1 - alpha) * self._need(self.ce, "cross entropy") + alpha * divergence_N

    @staticmethod
    def _need(term: torch.Tensor | None, name: str) -> torch.Tensor:
        if term is None:
            raise ObjectiveError(f"alpha needs the {name}, which was not computed; ask for it with with_ce=True")
        return term


def check_reduction(reduction: str, normalizer: float | torch.Tensor | None) -> None:
    """Raise ObjectiveError for an unknown reduction or a normalizer that cannot divide."""
    if reduction not in REDUCTIONS:
        raise ObjectiveError(f"reduction is {reduction!r}; use one of {', '.join(REDUCTIONS)}")
    if normalizer is None:
        return
    if reduction != "mean":
        raise ObjectiveError(f"normalizer divides the mean only, but reduction is {reduction!r}; leave one of them out")
    if not isinstance(normalizer, torch.Tensor) and not (math.isfinite(normalizer) and normalizer > 0):
        raise ObjectiveError(f"normalizer is {normalizer}; it must be a finite number above 0")
    if isinstance(normalizer, torch.Tensor) and normalizer.numel() != 1:
        raise ObjectiveError(f"normalizer has shape {tuple(normalizer.shape)}; it must be one number")


def reduce_rows(
    rows_N: torch.Tensor, counted_N: torch.Tensor, reduction: str, normalizer: float | torch.Tensor | None
) -> torch.Tensor:
    """Reduce per-row losses that are already 0 where they do not count; nothing counted gives 0, not NaN."""
    if reduction == "none":
        return rows_N
    total = rows_N.sum()
    if reduction == "sum":
        return total
    if normalizer is None:
        return total / counted_N.sum().clamp(min=1)
    return total / (normalizer.reshape(()) if isinstance(normalizer, torch.Tensor) else normalizer)


def distillation_terms(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    targets: SparseTargets | DeviceTargets | None,
    objective: Objective | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    *,
    head: HeadOptions | None = None,
    ignore_index: int = -100,
    with_ce: bool = True,
    blend: float | torch.Tensor = 0.5,
    z_loss: float = 0.0,
) -> DistillationTerms:
    """Cross entropy and divergence of each row from one pass over the head, for training and for logging.

    Args:
        hidden, weight, labels, targets, objective, temperature, impl, ignore_index, blend, z_loss: as in
            `distillation_loss`.
        head: bias, softcap, logit_scale and valid_vocab.
        with_ce: False leaves the cross entropy out; the labels' values are then not read (except by tail='label' and
            policy_gradient).

    Returns:
        DistillationTerms; `terms.loss(alpha)` is what `distillation_loss` returns.

    Raises:
        ObjectiveError, TargetsError: as in `distillation_loss`.
    """
    head = head or HeadOptions()
    check_head(hidden, weight, head)
    check_labels(labels, hidden)
    objective = objective or Objective.default_for(bool(getattr(targets, "unbiased", False)))
    if not isinstance(objective, Objective):
        raise ObjectiveError(f"objective is {objective!r}; build one, for example Objective.forward_kl(tail='bucket')")
    check_share("blend", blend, len(labels))
    check_z_loss(z_loss)
    columns = head.columns(weight)
    stored = _what_is_read(targets, objective, temperature, hidden, columns)
    counted_N = labels != ignore_index
    label_N = None
    if with_ce or objective.reads_labels:
        check_label_values(labels, counted_N, columns)
        label_N = labels.masked_fill(~counted_N, -1)
    if stored is not None and objective.kind == "policy_gradient":
        check_label_logprob(stored, counted_N)
    ids_NK = labels.new_empty((len(labels), 0)) if stored is None else stored.ids
    student = gather_student(hidden, weight, ids_NK, label_N, head, impl)
    ce_N = divergence_N = z_loss_N = None
    if student.log_p_label_N is not None and (with_ce or stored is None):
        ce_N = torch.where(counted_N, -student.log_p_label_N, 0.0)
    if stored is not None:
        divergence_N = divergence(gather_terms(student, stored, blend), objective, temperature)
        divergence_N = torch.where(counted_N, divergence_N, 0.0)
    if z_loss != 0:
        z_loss_N = torch.where(counted_N, z_loss * student.lse_N.square(), 0.0)
    dtype = accumulation_dtype(hidden, weight)
    return DistillationTerms(ce_N, divergence_N, counted_N, temperature, dtype, z_loss_N)


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
