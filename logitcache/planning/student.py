"""How fast a student would learn from a cache on this machine."""

from __future__ import annotations

import time

import torch

from logitcache import models
from logitcache.losses import LossSettings, Objective, patch_forward
from logitcache.reader import CacheDataset, ReaderOptions
from logitcache.store import Cache
from logitcache.training.load import load_student

# As `logitcache train` does by default.
BATCH_TOKENS = 4096
STEPS = 2


def student_rate(source: str, cache: Cache, device: str) -> float:
    """Tokens a second of whole steps of AdamW, reading included; the faster of two after a first one.

    Args:
        source: model folder, hub id or file of a transformers config.
        cache: what it learns from.
        device: "auto", "cpu" or "cuda".

    Raises:
        ModelError, TrainingError: the student cannot be loaded, or does not fit the cache.
    """
    chosen = models.choose_device(device)
    student = load_student(source, cache, None, seed=0).to(chosen).train()
    # A label's log-probability is all that policy-gradient needs, and of use to nothing else.
    labels_only = LossSettings(Objective.policy_gradient(), alpha=1.0)
    patch_forward(student, LossSettings() if cache.keeps_ids else labels_only)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    blocks = max(1, min(BATCH_TOKENS // cache.block_length, cache.num_blocks))
    options = ReaderOptions(blocks, pin_memory=chosen.type == "cuda")
    seconds, tokens = [], 0
    last = time.perf_counter()
    for packed in CacheDataset(cache, options, num_batches=STEPS + 1):
        batch = packed.to(chosen, non_blocking=True)
        with torch.autocast(chosen.type, torch.bfloat16, enabled=chosen.type == "cuda"):
            loss = student(input_ids=batch.input_ids, shift_labels=batch.labels, teacher_targets=batch.targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())
        now = time.perf_counter()
        seconds.append(now - last)
        last, tokens = now, batch.input_ids.numel()
    return tokens / min(seconds[1:])
