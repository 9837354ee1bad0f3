"""Batches, trainers and hand-made losses for the tests of the trainer.

Legend: B blocks of L tokens, N = B * L rows, V ids, K stored ids per row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

from logitcache.reader import Batch, make_batch
from logitcache.store import open_cache
from logitcache.training import DistillationSettings, DistillationTrainer


def read_batches(folder: Path, size: int, count: int, first: int = 0) -> list[Batch]:
    """`count` batches of `size` blocks."""
    cache = open_cache(folder)
    starts = range(first, first + size * count, size)
    return [make_batch([cache.read_blocks(start, start + size)]) for start in starts]


def mask_labels(batches: list[Batch], seed: int = 0) -> None:
    """Leave out labels in place: of each block another share."""
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        labels = batch["labels"]
        share = torch.rand((len(labels), 1), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < share] = -100


def trainer_of(
    model: Any, batches: Any, settings: DistillationSettings, out: Path, steps: int, **arguments: Any
) -> DistillationTrainer:
    """A quiet trainer on the CPU: constant learning rate, no weight decay, no clipping, each step logged."""
    fixed = {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
    }
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **{**fixed, **arguments},
    )
    trainer = DistillationTrainer(model, args, batches, settings)
    trainer.remove_callback(PrinterCallback)
    return trainer


def logged(trainer: DistillationTrainer, name: str) -> list[float]:
    """A logged value at each step."""
    return [row[name] for row in trainer.state.log_history if name in row]


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def dense_terms(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy and mean bucket KL of the rows that count, from the model's own logits, in float64."""
    mask = batch["labels"] != -100
    logq_NV = model(input_ids=batch["input_ids"]).logits[mask].double().log_softmax(-1)
    ce_N = -logq_NV.gather(1, batch["labels"][mask][:, None]).squeeze(1)
    rows = {name: batch["targets"][name].unflatten(0, mask.shape)[mask] for name in ("ids", "weights", "tail_mass")}
    stored_NK = rows["ids"] >= 0
    p_NK, tail_N = rows["weights"].double(), rows["tail_mass"].double()
    logq_NK = logq_NV.gather(1, rows["ids"].clamp(min=0))
    rest_N = 1 - torch.where(stored_NK, logq_NK.exp(), 0).sum(1)
    head_N = torch.where(stored_NK, torch.special.xlogy(p_NK, p_NK) - p_NK * logq_NK, 0).sum(1)
    kl_N = head_N + torch.special.xlogy(tail_N, tail_N) - torch.special.xlogy(tail_N, rest_N)
    return ce_N.mean(), kl_N.mean()
