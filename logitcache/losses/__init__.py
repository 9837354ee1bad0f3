"""Objectives over cached teacher targets, in closed form over gathered logits."""

from __future__ import annotations

from logitcache.kernels import HeadOptions, VocabularyShard
from logitcache.losses.loss import distillation_loss
from logitcache.losses.objective import KINDS, TAILS, Objective
from logitcache.losses.terms import DistillationTerms, distillation_terms

__all__ = [
    "KINDS",
    "TAILS",
    "DistillationTerms",
    "HeadOptions",
    "Objective",
    "VocabularyShard",
    "distillation_loss",
    "distillation_terms",
]
