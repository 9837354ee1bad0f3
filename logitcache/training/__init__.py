"""Batches -> a trained student: transformers.Trainer with the fused loss, schedules and evaluation."""

from logitcache.training.evaluation import evaluate_blocks
from logitcache.training.schedules import AlphaSchedule, BlendSchedule
from logitcache.training.trainer import DistillationSettings, DistillationTrainer

__all__ = ["AlphaSchedule", "BlendSchedule", "DistillationSettings", "DistillationTrainer", "evaluate_blocks"]
