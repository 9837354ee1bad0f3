"""Objectives over cached teacher targets, in closed form over gathered logits."""

from __future__ import annotations

from logitcache.kernels import HeadOptions, VocabularyShard
from logitcache.losses.loss import LossOutput, distillation_loss, distillation_output, distillation_terms
from logitcache.losses.objective import KINDS, TAILS, Objective
from logitcache.losses.options import LossOptions
from logitcache.losses.terms import DistillationTerms

__all__ = [
    "KINDS",
    "TAILS",
    "LossOutput",
    "DistillationTerms",
    "HeadOptions",
    "LossOptions",
    "Objective",
    "VocabularyShard",
    "distillation_loss",
    "distillation_output",
    "distillation_terms",
]
