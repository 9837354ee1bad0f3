"""Objectives over cached teacher targets, in closed form over gathered logits; and models patched to use them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from logitcache.kernels import HeadOptions, VocabularyShard
from logitcache.losses.inputs import pack_targets
from logitcache.losses.loss import LossOutput, distillation_loss, distillation_output, distillation_terms
from logitcache.losses.masks import TokenMask
from logitcache.losses.objective import KINDS, TAILS, Objective
from logitcache.losses.options import LossOptions
from logitcache.losses.settings import LossSettings
from logitcache.losses.terms import DistillationTerms

if TYPE_CHECKING:
    from logitcache.losses.patch import is_patched, patch_forward, unpatch_forward
    from logitcache.losses.patched_forward import DistillationOutput

__all__ = [
    "KINDS",
    "TAILS",
    "DistillationOutput",
    "DistillationTerms",
    "HeadOptions",
    "LossOptions",
    "LossOutput",
    "LossSettings",
    "Objective",
    "TokenMask",
    "VocabularyShard",
    "distillation_loss",
    "distillation_output",
    "distillation_terms",
    "is_patched",
    "pack_targets",
    "patch_forward",
    "unpatch_forward",
]

# These import transformers, which the loss itself does without.
_LAZY = {
    "DistillationOutput": "patched_forward",
    "is_patched": "patch",
    "patch_forward": "patch",
    "unpatch_forward": "patch",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'logitcache.losses' has no attribute {name!r}")
    return getattr(importlib.import_module(f"logitcache.losses.{_LAZY[name]}"), name)
