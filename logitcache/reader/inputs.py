"""A batch of a cache as keyword arguments of a patched model, for trainers that know nothing of caches.

Legend: B blocks of a batch, L block length, K longest row of the batch.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from logitcache.errors import TrainingError
from logitcache.losses import pack_targets
from logitcache.reader.dataset import Batch, batch_targets
from logitcache.reader.packed import IGNORED, PackedBatch


def model_inputs(batch: Batch | PackedBatch, unbiased: bool | None) -> dict[str, Any]:
    """What a model of `logitcache.losses.patch_forward` takes, from a batch of `CacheDataset` or `make_batch`.

    The labels of a batch are shifted already; here they come back in transformers' convention, under its name, so that
    a Trainer counts them rightly and the model shifts them once.

    Args:
        batch: a `PackedBatch`, or {"input_ids", "labels", "targets"}.
        unbiased: `cache.unbiased`, of the cache that the rows are from; None leaves the teacher's rows out.

    Returns:
        input_ids int64 [B, L], labels int64 [B, L] and teacher_targets, a dict of tensors [B, L] and [B, L, K].

    Raises:
        TrainingError: the teacher's rows are not in the batch, or a block's last position has a label.
    """
    tokens, following = batch["input_ids"], batch["labels"]
    if bool((following[:, -1] != IGNORED).any()):
        raise TrainingError(
            "the last position of a block has a label, which labels in transformers' convention have no place for; "
            "call the model with shift_labels"
        )
    inputs: dict[str, Any] = {"input_ids": tokens, "labels": F.pad(following[:, :-1], (1, 0), value=IGNORED)}
    if unbiased is None:
        return inputs
    if "targets" not in batch:
        raise TrainingError(
            "the batch has no targets; read it with them, and tell Trainer remove_unused_columns=False, as it drops "
            "columns that the model's forward does not name"
        )
    blocks, length = tokens.shape
    inputs["teacher_targets"] = pack_targets(batch_targets(batch, unbiased), (blocks, length))
    return inputs
