"""Caches and teachers that are wrong in one known way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache import models
from logitcache.store import Blocks, Cache, CacheWriter, Identity, open_cache
from logitcache.targets import SparseTargets
from logitcache.teachers import BlockBatch, TransformersTeacher
from logitcache.teachers.capture import capture_blocks
from tests.store.caches import commit

Change = Callable[[Blocks], SparseTargets]


def rewritten(source: Path, root: Path, change: Change, identity: Identity | None = None) -> Path:
    """A finished cache of the same plan and tokens, with the rows [N] that `change` makes of all blocks."""
    cache = open_cache(source)
    blocks = cache.read_blocks(0, cache.num_blocks)
    real = np.flatnonzero(blocks.valid)
    tokens, targets = blocks.tokens.ravel()[real], change(blocks).take(real)
    writer = CacheWriter.open(root, identity or cache.manifest.identity, cache.manifest.origin)
    for unit in writer.pending_units():
        commit(writer, unit, tokens, targets)
    writer.finalize()
    return root


def moved(by: int, which: slice = slice(None), columns: bool = True) -> Change:
    """Row t of some blocks is what was row t - by; `columns`: their scalars, too."""

    def change(blocks: Blocks) -> SparseTargets:
        count, length = blocks.tokens.shape
        place = np.arange(count * length).reshape(count, length)
        place[which] = np.clip(np.arange(length) - by, 0, length - 1) + place[which, :1]
        # A block that ends early has nothing to move beyond its end.
        place = np.where(blocks.valid.ravel()[place], place, np.arange(place.size).reshape(place.shape)).ravel()
        targets = blocks.targets.take(place)
        kept = blocks.targets
        return targets if columns else targets.with_columns(kept.label_logprob, kept.entropy)

    return change


def given(teacher: Path, cache: Cache, prefix: int | None = None, dropped: int = 0) -> Change:
    """Rows of a teacher that was fed a token more, or some less, at each block's beginning."""
    loaded = TransformersTeacher.load(teacher, device="cpu")

    def change(blocks: Blocks) -> SparseTargets:
        fed = blocks.tokens[:, dropped:] if prefix is None else np.insert(blocks.tokens, 0, prefix, axis=1)
        count, width = fed.shape
        batch = BlockBatch(fed, 0, fed.size, [cache.selection], cache.manifest.identity.seed)
        [targets] = capture_blocks(loaded, batch)
        place = np.arange(blocks.tokens.shape[1]) - dropped + (prefix is not None)
        rows: NDArray[np.int64] = np.arange(count)[:, None] * width + np.maximum(place, 0)
        return targets.take(rows.ravel())

    return change


def changed_teacher(source: Path, root: Path, change: Callable[[Any], None], tokenizer: Any = None) -> Path:
    """A copy of a teacher with other weights, or another tokenizer."""
    model = models.load_model(source, device="cpu")
    change(model)
    models.save_model(model, root, tokenizer or models.load_tokenizer(source))
    return root


def one_step(model: Any) -> None:
    """A step of fine-tuning: AdamW at 1e-3 on a few tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.arange(5, 37).reshape(1, -1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def rounded(model: Any) -> None:
    """Weights with bfloat16's digits, in float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())


def unchanged(model: Any) -> None:
    """The same weights."""
