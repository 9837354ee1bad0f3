"""How the rows of a batch become one loss: everything that is not a tensor of the batch or of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from logitcache.errors import ObjectiveError
from logitcache.losses.checks import check_share, check_z_loss, values_are_free
from logitcache.losses.objective import Objective

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True, eq=False)
class LossOptions:
    """What is minimised, and by which implementation. Each field is the keyword of `distillation_loss` of that name.

    Raises:
        ObjectiveError: a value is out of range or of the wrong kind.
    """

    objective: Objective | None = None
    alpha: float | torch.Tensor = 0.9
    temperature: float = 1.0
    impl: str = "auto"
    reduction: str = "mean"
    ignore_index: int = -100
    normalizer: float | torch.Tensor | None = None
    blend: float | torch.Tensor = 0.5
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.objective is not None and not isinstance(self.objective, Objective):
            raise ObjectiveError(
                f"objective is {self.objective!r}; build one, for example Objective.forward_kl(tail='bucket')"
            )
        check_share("alpha", self.alpha)
        check_share("blend", self.blend)
        check_z_loss(self.z_loss)
        check_reduction(self.reduction, self.normalizer)

    def slice(self, start: int, stop: int) -> LossOptions:
        """The options of the rows [start, stop): what differs by row is cut."""
        return replace(self, alpha=_of_rows(self.alpha, start, stop), blend=_of_rows(self.blend, start, stop))

    @property
    def effective_objective(self) -> Objective | None:
        """The objective; with an alpha of exactly 0 (a Python number) it is the cross entropy."""
        if not isinstance(self.alpha, torch.Tensor) and self.alpha == 0:
            return Objective.cross_entropy()
        return self.objective

    @property
    def with_ce(self) -> bool:
        """Whether the cross entropy enters the loss."""
        return isinstance(self.alpha, torch.Tensor) or self.alpha != 1


def _of_rows(value: float | torch.Tensor, start: int, stop: int) -> float | torch.Tensor:
    return value[start:stop] if isinstance(value, torch.Tensor) and value.ndim else value


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
    if isinstance(normalizer, torch.Tensor) and values_are_free(normalizer) and not float(normalizer) > 0:
        raise ObjectiveError(f"normalizer is {float(normalizer)}; it must be above 0")


def denominator(
    counted_N: torch.Tensor, reduction: str, normalizer: float | torch.Tensor | None
) -> float | torch.Tensor:
    """What the sum of the row losses is divided by; 1 rather than 0 when nothing counts, so that the loss is 0."""
    if reduction == "sum":
        return 1.0
    if normalizer is None:
        return counted_N.sum().clamp(min=1)
    return normalizer.reshape(()) if isinstance(normalizer, torch.Tensor) else normalizer
