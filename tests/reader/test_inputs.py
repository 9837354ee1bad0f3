"""A batch of a cache as arguments of a patched model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from logitcache.errors import TrainingError
from logitcache.losses import patch_forward
from logitcache.reader import Batch, batch_targets, make_batch, model_inputs
from logitcache.store import open_cache
from tests.caches import Dumped
from tests.tiny import tiny_model


@pytest.fixture
def batch(dumped: Dumped) -> Batch:
    return make_batch([open_cache(dumped.top_k).read_blocks(0, 3)])


def test_labels_come_back_in_transformers_convention(batch: Batch) -> None:
    inputs = model_inputs(batch, unbiased=None)
    assert inputs.keys() == {"input_ids", "labels"}
    counted = inputs["labels"] != -100
    assert torch.equal(inputs["labels"][counted], batch["input_ids"][counted])
    assert int(counted.sum()) == int((batch["labels"] != -100).sum()) > 0


def test_a_patched_model_gives_the_loss_of_the_batch(batch: Batch) -> None:
    model = patch_forward(tiny_model("llama", seed=2))
    inputs = model_inputs(batch, unbiased=False)
    assert inputs["teacher_targets"]["ids"].shape[:2] == batch["input_ids"].shape
    expected = model(
        batch["input_ids"], shift_labels=batch["labels"], teacher_targets=batch_targets(batch, unbiased=False)
    )
    assert torch.equal(model(**inputs).loss, expected.loss)


def refused(batch: Any, unbiased: bool | None) -> str:
    with pytest.raises(TrainingError) as caught:
        model_inputs(batch, unbiased)
    return str(caught.value)


def test_what_has_no_place(batch: Batch) -> None:
    lost = {name: batch[name] for name in ("input_ids", "labels")}
    assert "tell Trainer remove_unused_columns=False" in refused(lost, False)
    batch["labels"][1, -1] = 5
    assert "the last position of a block has a label" in refused(batch, None)
