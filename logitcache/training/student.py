"""A causal language model that answers `model(..., distillation=...)` with losses instead of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from logitcache import models
from logitcache.losses import DistillationTerms, HeadOptions, Objective, distillation_terms
from logitcache.targets import DeviceTargets


@dataclass(frozen=True)
class DistillationCall:
    """What one forward pass needs besides tokens.

    Args:
        labels: int64 [B, L], next tokens; -100 where there is none.
        targets: the teacher's rows for the B * L positions; None trains on labels alone.
        objective: the divergence; None for what suits the targets.
        temperature: of the divergence.
        impl, blend, z_loss: of `distillation_loss`.
    """

    labels: torch.Tensor
    targets: DeviceTargets | None
    objective: Objective | None = None
    temperature: float = 1.0
    impl: str = "auto"
    blend: float | torch.Tensor = 0.5
    z_loss: float = 0.0


def attach_distillation(model: Any) -> None:
    """Let `model(input_ids=..., distillation=DistillationCall(...))` return DistillationTerms of its B * L rows.

    The call goes through the model's own forward, so wrappers such as DDP see it; the logits [B, L, V] are never made.
    Without the keyword the model behaves as before. Saving is unaffected. Attaching twice changes nothing.

    Raises:
        ModelError: the architecture's head is not understood.
    """
    models.check_split(model)
    if getattr(model, "_logitcache_attached", False):
        return
    plain_forward = model.forward

    def forward(*args: Any, distillation: DistillationCall | None = None, **kwargs: Any) -> Any:
        if distillation is None:
            return plain_forward(*args, **kwargs)
        return _terms(model, kwargs["input_ids"], distillation)

    model.forward = forward
    model._logitcache_attached = True


def _terms(model: Any, input_ids: torch.Tensor, call: DistillationCall) -> DistillationTerms:
    hidden = models.body_hidden(model, input_ids)
    _, head = models.split_model(model)
    return distillation_terms(
        hidden.flatten(0, 1),
        head.weight,
        call.labels.flatten(),
        call.targets,
        call.objective,
        call.temperature,
        call.impl,
        head=HeadOptions(bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale),
        blend=call.blend,
        z_loss=call.z_loss,
    )
