"""Token masks in DistillationTrainer: accumulation, packed batches and what is logged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.errors import ObjectiveError
from logitcache.losses import Objective, TokenMask, patch_forward
from logitcache.reader import Batch, CacheDataset, ReaderOptions
from logitcache.store import open_cache
from logitcache.training import AlphaSchedule, DistillationSettings
from tests.caches import Dumped
from tests.tiny import tiny_model
from tests.training.batches import logged, mask_labels, read_batches, trainer_of, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

MASKS = [TokenMask(by, 0.4, rest) for by in ("teacher-entropy", "student-entropy") for rest in ("labels", "nothing")]


def settings(mask: TokenMask | None, **fields: Any) -> DistillationSettings:
    return DistillationSettings(Objective.forward_kl("bucket"), AlphaSchedule(peak=0.8), mask=mask, **fields)


def kept_of(mask: TokenMask, batches: list[Batch]) -> tuple[int, int]:
    """How many labelled tokens keep the divergence, and how many there are."""
    counts = [int(count) for batch in batches for count in (batch["labels"] != -100).sum(1)]
    return sum(max(1, math.floor(mask.keep * count + 0.5)) for count in counts if count), sum(counts)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask.by}-{mask.rest}")
def test_accumulation(mask: TokenMask, dumped: Dumped, tmp_path: Path) -> None:
    """Once 8 blocks, or 4 times 2, whose numbers of labels differ widely: the same losses, logs and weights."""
    small = read_batches(dumped.top_k, 2, 8)
    mask_labels(small)
    small[1]["labels"][:] = -100
    large = read_batches(dumped.top_k, 8, 2)
    for number, batch in enumerate(large):
        batch["labels"] = torch.cat([part["labels"] for part in small[4 * number : 4 * number + 4]])
    runs = []
    for batches, accumulate in ((large, 1), (small, 4)):
        trainer = trainer_of(
            tiny_model("llama", seed=5), batches, settings(mask), tmp_path, 2, gradient_accumulation_steps=accumulate
        )
        trainer.train()
        runs.append(trainer)
    for name in ("loss", "ce", "divergence", "kept"):
        assert logged(runs[0], name) == pytest.approx(logged(runs[1], name), rel=1e-5), name
    shares = [kept / total for kept, total in (kept_of(mask, [batch]) for batch in large)]
    assert logged(runs[0], "kept") == pytest.approx(shares, rel=1e-7)
    for name, value in weights_of(runs[0].model).items():
        torch.testing.assert_close(value, weights_of(runs[1].model)[name], rtol=1e-4, atol=5e-5, msg=name)


@pytest.mark.parametrize("rest", ["labels", "nothing"])
def test_the_loss_of_a_step(rest: str, dumped: Dumped, tmp_path: Path) -> None:
    """The mean of the terms as logged: over all tokens with the labels' rest, over those kept without one."""
    batches = read_batches(dumped.top_k, 4, 1)
    mask_labels(batches)
    trainer = trainer_of(tiny_model("llama", seed=5), batches, settings(TokenMask(keep=0.4, rest=rest)), tmp_path, 1)
    trainer.train()
    with torch.no_grad():
        output = patch_forward(tiny_model("llama", seed=5))(
            batches[0]["input_ids"], shift_labels=batches[0]["labels"], teacher_targets=batches[0]["targets"]
        )
    counted = batches[0]["labels"] != -100
    kept = TokenMask(keep=0.4).kept(batches[0]["targets"]["entropy"].view(counted.shape), counted)
    mixed = (0.2 * output.ce + 0.8 * output.divergence)[kept].sum()
    expected = mixed / kept.sum() if rest == "nothing" else (mixed + output.ce[counted & ~kept].sum()) / counted.sum()
    assert logged(trainer, "loss") == pytest.approx([expected.item()], rel=1e-5)
    means = kept if rest == "nothing" else counted
    assert logged(trainer, "ce") == pytest.approx([output.ce[means].mean().item()], rel=1e-6)
    assert logged(trainer, "divergence") == pytest.approx([output.divergence[means].mean().item()], rel=1e-6)


@pytest.mark.parametrize("cache", ["top_k", "varopt"])
def test_packed_batches(cache: str, dumped: Dumped, tmp_path: Path) -> None:
    """A batch in one buffer brings the teacher's entropy; blocks of a dataset in the order that it reads them."""
    opened = open_cache(getattr(dumped, cache))
    mask = TokenMask("teacher-entropy", 0.4, "nothing")
    chosen = DistillationSettings(Objective.default_for(opened.unbiased), unbiased=opened.unbiased, mask=mask)
    options = ReaderOptions(4, seed=3)
    plain = [batch.unpack() for _, batch in zip(range(3), CacheDataset(opened, options), strict=False)]
    runs = []
    for batches in (CacheDataset(opened, options), plain):
        runs.append(trainer_of(tiny_model("llama", seed=5), batches, chosen, tmp_path, 3))
        runs[-1].train()
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    shares = [kept / total for kept, total in (kept_of(mask, [batch]) for batch in plain)]
    assert logged(runs[0], "kept") == pytest.approx(shares, rel=1e-7)


def test_without_a_mask_nothing_is_said_to_be_kept(dumped: Dumped, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model("llama"), read_batches(dumped.top_k, 2, 1), settings(None), tmp_path, 1)
    trainer.train()
    assert not logged(trainer, "kept")


def test_labels_alone_have_nothing_to_mask(dumped: Dumped, tmp_path: Path) -> None:
    chosen = DistillationSettings(Objective.cross_entropy(), mask=TokenMask())
    with pytest.raises(ObjectiveError, match="cross_entropy has no distillation term"):
        trainer_of(tiny_model("llama"), read_batches(dumped.top_k, 2, 1), chosen, tmp_path, 1)
