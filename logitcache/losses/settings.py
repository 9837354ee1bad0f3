"""What a patched model minimises, fixed once: one frozen value instead of arguments on every call."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from logitcache.errors import ObjectiveError
from logitcache.kernels import HeadOptions, resolve_implementation
from logitcache.losses.objective import Objective, check_alpha
from logitcache.losses.terms import DistillationTerms, distillation_terms
from logitcache.targets import DeviceTargets, SparseTargets


@dataclass(frozen=True)
class LossSettings:
    """Settings of `patch_forward`; they mean what the arguments of `distillation_loss` mean.

    Args:
        objective: the divergence, or Objective.cross_entropy() for labels alone. None: what suits the targets of a
            batch, and labels alone where a batch brings none.
        alpha: weight of the divergence.
        temperature: T of the divergence.
        impl: 'auto', 'split' or 'reference'.
        valid_vocab: number of real tokens where the head has padded rows; None counts all rows, as the model does.
        ignore_index: the label of positions that do not count.
        unbiased: whether targets that come as a dict of tensors without a key of this name are unbiased samples.
        has_exact_head: whether such samples say which of them are exact (varopt:K); None looks where that is free.

    Raises:
        ObjectiveError: a value that no batch could make right.
    """

    objective: Objective | None = None
    alpha: float = 0.9
    temperature: float = 1.0
    impl: str = "auto"
    valid_vocab: int | None = None
    ignore_index: int = -100
    unbiased: bool = False
    has_exact_head: bool | None = None

    def __post_init__(self) -> None:
        if self.objective is not None and not isinstance(self.objective, Objective):
            raise ObjectiveError(f"objective is {self.objective!r}; build one, for example Objective.forward_kl()")
        check_alpha(self.alpha)
        if isinstance(self.alpha, torch.Tensor):
            raise ObjectiveError("alpha is a tensor, but settings hold a number; pass the tensor as model(..., alpha=)")
        resolve_implementation(self.impl)
        (self.objective or Objective.cross_entropy()).check(
            self.objective is not None and self.objective.tail == "unbiased", self.temperature, self.alpha
        )

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

    def terms(
        self,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        targets: SparseTargets | DeviceTargets | None,
        head: HeadOptions,
    ) -> DistillationTerms:
        """`distillation_terms` with these settings; without targets, those of cross entropy alone."""
        return distillation_terms(
            hidden_ND,
            weight_VD,
            labels_N,
            targets,
            objective=Objective.cross_entropy() if targets is None else self.objective,
            temperature=self.temperature,
            impl=self.impl,
            head=replace(head, valid_vocab=self.valid_vocab),
            ignore_index=self.ignore_index,
        )
