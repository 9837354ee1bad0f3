"""What a patched model minimises, fixed once: one frozen value instead of arguments on every call."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from logitcache.errors import ObjectiveError
from logitcache.kernels import HeadOptions, check_implementation
from logitcache.losses.checks import check_share
from logitcache.losses.loss import LossOutput, distillation_output
from logitcache.losses.masks import TokenMask
from logitcache.losses.objective import Objective
from logitcache.losses.options import LossOptions
from logitcache.losses.student import working_dtype
from logitcache.targets import DeviceTargets, SparseTargets


@dataclass(frozen=True)
class LossSettings:
    """Settings of `patch_forward`; they mean what the arguments of `distillation_loss` mean.

    Args:
        objective: the divergence, or Objective.cross_entropy() for labels alone. None: what suits the targets of a
            batch, and labels alone where a batch brings none.
        alpha: weight of the divergence.
        temperature: T of the divergence.
        impl: as in `distillation_loss`.
        blend: share of the unbiased term of tail='blend'.
        z_loss: coefficient of lse^2, added whatever alpha is.
        valid_vocab: number of real tokens where the head has padded rows; None counts all rows, as the model does.
        ignore_index: the label of positions that do not count.
        unbiased: whether targets that come as a dict of tensors without a key of this name are unbiased samples.
        has_exact_head: whether such samples say which of them are exact (varopt:K); None looks where that is free.
        mask: which positions of a batch with targets keep the divergence; None: all that count.

    Raises:
        ObjectiveError: a value that no batch could make right.
    """

    objective: Objective | None = None
    alpha: float = 0.9
    temperature: float = 1.0
    impl: str = "auto"
    blend: float = 0.5
    z_loss: float = 0.0
    valid_vocab: int | None = None
    ignore_index: int = -100
    unbiased: bool = False
    has_exact_head: bool | None = None
    mask: TokenMask | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "blend"):
            if isinstance(getattr(self, name), torch.Tensor):
                raise ObjectiveError(
                    f"{name} is a tensor, but settings hold a number; pass the tensor as model(..., {name}=)"
                )
        self._options()
        check_implementation(self.impl)
        self._check_mask()
        (self.objective or Objective.cross_entropy()).check(
            self.objective is not None and self.objective.tail in ("unbiased", "blend"),
            self.temperature,
            self.alpha,
            has_exact_head=True,
        )

    def _check_mask(self) -> None:
        if not isinstance(self.mask, TokenMask | None):
            raise ObjectiveError(f"mask is {self.mask!r}; build one, for example TokenMask('teacher-entropy', 0.85)")
        if self.mask is not None and self.objective is not None and not self.objective.reads_targets:
            raise ObjectiveError(
                f"mask is {self.mask}, but {self.objective.kind} has no distillation term to keep or to drop; leave "
                "the mask out"
            )

    def _options(self, **changed: Any) -> LossOptions:
        """What the loss takes of these settings, with what came with the call."""
        mine = ("objective", "alpha", "temperature", "impl", "ignore_index", "blend", "z_loss")
        return LossOptions(**({name: getattr(self, name) for name in mine} | changed))

    def with_fields(self, values: dict[str, Any]) -> LossSettings:
        """These settings with some fields changed; ObjectiveError names a field that does not exist."""
        known = [field.name for field in fields(self)]
        for name in values:
            if name not in known:
                raise ObjectiveError(f"there is no setting {name!r}; the settings are {', '.join(known)}")
        return replace(self, **values)

    @property
    def reads_targets(self) -> bool:
        """Whether the teacher's rows are read at all."""
        return self.alpha != 0 and not (self.objective is not None and self.objective.kind == "cross_entropy")

    def output(
        self,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        targets: SparseTargets | DeviceTargets | None,
        head: HeadOptions,
        alpha: float | torch.Tensor | None = None,
        blend: float | torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> LossOutput:
        """`distillation_output` with these settings; without targets, that of cross entropy alone.

        `kept`, [N] or [B, L], says which positions the mask keeps. `head` says how many tokens are valid.
        """
        if alpha is not None and not isinstance(alpha, torch.Tensor):
            check_share("alpha", alpha)
            # A number that comes with each call is one of a schedule: as a tensor it leaves no term out whatever it is,
            # and changes no compiled graph.
            alpha = hidden_ND.new_full((), alpha, dtype=working_dtype(hidden_ND.device))
        alpha = self.alpha if alpha is None else alpha
        if kept is not None and self.mask is not None:
            if self.mask.rest == "labels":
                alpha = alpha * kept.flatten().to(working_dtype(kept.device))
            else:
                labels_N = labels_N.masked_fill(~kept.flatten(), self.ignore_index)
        options = self._options(
            objective=Objective.cross_entropy() if targets is None else self.objective,
            alpha=alpha,
            blend=self.blend if blend is None else blend,
            normalizer=normalizer,
        )
        return distillation_output(hidden_ND, weight_VD, labels_N, targets, options, head)
