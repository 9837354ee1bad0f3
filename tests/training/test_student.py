"""attach_distillation: the plain forward as before, the distillation call without [B, L, V] logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from logitcache import models
from logitcache.errors import ModelError
from logitcache.kernels import slices
from logitcache.losses import Objective
from logitcache.reader import Batch, batch_targets
from logitcache.training.student import DistillationCall, attach_distillation
from tests.caches import Dumped
from tests.tiny import tiny_model
from tests.training.batches import dense_terms, read_batches

FAMILIES = ["llama", "gpt2", "gemma2", "phi", "cohere"]


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def call_of(batch: Batch, impl: str = "auto") -> DistillationCall:
    return DistillationCall(batch["labels"], batch_targets(batch, unbiased=False), impl=impl)


@pytest.fixture
def batch(dumped: Dumped) -> Batch:
    return read_batches(dumped.top_k, 4, 1)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_forward_stays(family: str, batch: Batch) -> None:
    model = tiny_model(family, seed=2)
    ids = batch["input_ids"]
    before = model(input_ids=ids, labels=ids)
    attach_distillation(model)
    attach_distillation(model)
    after = model(input_ids=ids, labels=ids)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(before.logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_terms_are_those_of_the_models_logits(family: str, batch: Batch) -> None:
    """With soft capping, biases and logit scales."""
    model = tiny_model(family, seed=2)
    attach_distillation(model)
    terms = model(input_ids=batch["input_ids"], distillation=call_of(batch))
    ce, kl = dense_terms(model, batch)
    assert terms.loss(alpha=0.0).item() == pytest.approx(ce.item(), rel=1e-4)
    assert terms.loss(alpha=1.0).item() == pytest.approx(kl.item(), rel=1e-4)
    assert int(terms.counted.sum()) == int((batch["labels"] != -100).sum())


def test_labels_alone(batch: Batch) -> None:
    model = tiny_model("llama", seed=2)
    attach_distillation(model)
    call = DistillationCall(batch["labels"], None, Objective.cross_entropy())
    terms = model(input_ids=batch["input_ids"], distillation=call)
    assert terms.divergence is None
    assert terms.loss(alpha=0.0).item() == pytest.approx(dense_terms(model, batch)[0].item(), rel=1e-4)


def largest_of_a_step(model: Any, batch: Batch, impl: str) -> int:
    """Forward, backward and the optimiser's step."""
    optimizer = torch.optim.AdamW(model.parameters())
    with LargestTensor() as watch:
        model(input_ids=batch["input_ids"], distillation=call_of(batch, impl)).loss(alpha=0.5).backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return watch.numel


def test_no_logits_of_the_whole_batch(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor at all is as large as [B, L, V]: 5 slices of 64 ids here."""
    monkeypatch.setattr(slices, "MIN_COLUMNS", 64)
    monkeypatch.setattr(slices, "TILE_BYTES_CPU", 4)
    model = tiny_model("llama", seed=2).train()
    attach_distillation(model)
    logits = batch["input_ids"].numel() * 300
    assert largest_of_a_step(model, batch, "auto") < logits
    assert largest_of_a_step(model, batch, "reference") >= logits


def test_the_weights_gradients_do_not_depend_on_slices(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2", seed=2).train()
    attach_distillation(model)
    gradients = []
    for columns in (1024, 64):
        monkeypatch.setattr(slices, "MIN_COLUMNS", columns)
        monkeypatch.setattr(slices, "TILE_BYTES_CPU", 4)
        model.zero_grad()
        model(input_ids=batch["input_ids"], distillation=call_of(batch)).loss(alpha=0.5).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_saving_is_unaffected(tmp_path: Path, batch: Batch) -> None:
    model = tiny_model("llama", seed=2)
    attach_distillation(model)
    models.save_model(model, tmp_path / "saved")
    again = models.load_model(tmp_path / "saved", device="cpu")
    ids = batch["input_ids"]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_head_that_is_not_understood() -> None:
    model = tiny_model("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="plain linear LM head"):
        attach_distillation(model)
