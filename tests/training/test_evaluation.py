"""Evaluation against plain definitions: transformers' own loss, a dense KL, and calibration by a loop.

Legend: B blocks of L tokens, N = B * L rows, V ids, M counted rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from logitcache import models
from logitcache.reader import Batch, make_batch
from logitcache.store import open_cache
from logitcache.training import evaluate_blocks
from logitcache.training.evaluation import Calibration
from tests.caches import Dumped
from tests.tiny import tiny_model


def batches_of(folder: Any, sizes: tuple[int, ...] = (5, 3)) -> list[Batch]:
    """The last blocks of a cache, the padded one among them, in batches of these sizes."""
    cache = open_cache(folder)
    batches, stop = [], cache.num_blocks
    for size in sizes:
        batches.append(make_batch([cache.read_blocks(stop - size, stop)]))
        stop -= size
    return batches


@torch.no_grad()
def counted(model: Any, batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities float64 [M, V] and labels [M] of the rows that count, from the model's own logits."""
    logprobs, labels = [], []
    for batch in batches:
        mask = batch["labels"] != -100
        logprobs.append(model(input_ids=batch["input_ids"]).logits[mask].double().log_softmax(-1))
        labels.append(batch["labels"][mask])
    return torch.cat(logprobs), torch.cat(labels)


def naive_ece(confidence: Any, correct: Any, bins: int = 15) -> float:
    """Guo et al. 2017, equation 3."""
    total = 0.0
    for number in range(bins):
        inside = (confidence >= number / bins) & ((confidence < (number + 1) / bins) | (number == bins - 1))
        if inside.any():
            total += inside.sum() * abs(correct[inside].mean() - confidence[inside].mean())
    return total / len(confidence)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_cross_entropy_is_the_models_own(dumped: Dumped, family: str) -> None:
    model = tiny_model(family, seed=3)
    batches = batches_of(dumped.top_k)
    sums = tokens = 0.0
    for batch in batches:
        real = batch["labels"] != -100
        # Of its own labels transformers drops the first: shifted back, they are ours.
        own = torch.cat([torch.full((len(real), 1), -100), batch["labels"][:, :-1]], dim=1)
        with torch.no_grad():
            sums += float(model(input_ids=batch["input_ids"], labels=own).loss) * int(real.sum())
        tokens += int(real.sum())
    metrics = evaluate_blocks(model, batches, unbiased=False)
    assert metrics["tokens"] == tokens
    assert metrics["ce"] == pytest.approx(sums / tokens, rel=1e-5)


def test_full_kl_where_every_id_is_stored(dumped: Dumped) -> None:
    model = tiny_model("llama", seed=3)
    batches = batches_of(dumped.dense)
    logq_MV, labels_M = counted(model, batches)
    p_MV = torch.zeros_like(logq_MV)
    rows = torch.cat([batch["labels"].flatten() != -100 for batch in batches])
    ids = torch.cat([batch["targets"]["ids"] for batch in batches])[rows]
    weights = torch.cat([batch["targets"]["weights"] for batch in batches])[rows].double()
    p_MV = p_MV.scatter_add(1, ids.clamp(min=0), weights)
    kl = float((torch.special.xlogy(p_MV, p_MV) - p_MV * logq_MV).sum(1).mean())
    metrics = evaluate_blocks(model, batches, unbiased=False)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-4)

    teacher = models.load_model(dumped.teacher, device="cpu")
    logp_MV, _ = counted(teacher, batches)
    exact = float((logp_MV.exp() * (logp_MV - logq_MV)).sum(1).mean())
    assert metrics["kl"] == pytest.approx(exact, rel=1e-2)
    assert metrics["top1"] == pytest.approx(float((logp_MV.argmax(1) == logq_MV.argmax(1)).double().mean()), abs=0.02)
    assert metrics["ce"] == pytest.approx(float(-logq_MV.gather(1, labels_M[:, None]).mean()), rel=1e-6)


def test_bucket_kl_is_a_lower_bound(dumped: Dumped) -> None:
    model = tiny_model("llama", seed=3)
    full = evaluate_blocks(model, batches_of(dumped.dense), unbiased=False)
    top = evaluate_blocks(model, batches_of(dumped.top_k), unbiased=False)
    assert 0 < top["kl"] < full["kl"]
    assert top["ce"] == full["ce"]


@pytest.mark.parametrize("cache", ["top_k", "dense"])
def test_the_teacher_agrees_with_itself(dumped: Dumped, cache: str) -> None:
    teacher = models.load_model(dumped.teacher, device="cpu")
    metrics = evaluate_blocks(teacher, batches_of(getattr(dumped, cache)), unbiased=False)
    assert metrics["kl"] == pytest.approx(0, abs=1e-3)
    # Stored probabilities nearer than 1/16 nat are equal, so their order is lost.
    assert metrics["top1"] > 0.93


def test_sampled_rows(dumped: Dumped) -> None:
    """The estimate of the KL is noisy, and far nearer to 0 for the teacher than for a stranger."""
    batches = batches_of(dumped.sample, (20, 20))
    own = evaluate_blocks(models.load_model(dumped.teacher, device="cpu"), batches, unbiased=True)
    other = evaluate_blocks(tiny_model("llama", seed=3), batches, unbiased=True)
    full = evaluate_blocks(tiny_model("llama", seed=3), batches_of(dumped.dense, (20, 20)), unbiased=False)
    assert other["ce"] == pytest.approx(full["ce"], rel=1e-6)
    assert own["kl"] < 0.5 * other["kl"]
    assert own["top1"] > 10 * other["top1"]


def test_calibration_of_a_model(dumped: Dumped) -> None:
    model = tiny_model("llama", seed=3)
    batches = batches_of(dumped.top_k)
    logq_MV, labels_M = counted(model, batches)
    confidence, predicted = logq_MV.exp().max(1)
    expected = naive_ece(confidence.numpy(), (predicted == labels_M).double().numpy())
    assert evaluate_blocks(model, batches, unbiased=False)["ece"] == pytest.approx(expected, rel=1e-4)


def test_labels_alone(dumped: Dumped) -> None:
    batches = batches_of(dumped.top_k)
    plain = [{name: batch[name] for name in ("input_ids", "labels")} for batch in batches]
    model = tiny_model("llama", seed=3)
    with_rows, without = (evaluate_blocks(model, given, unbiased=False) for given in (batches, plain))
    assert without == {name: with_rows[name] for name in ("ce", "ece", "tokens")}


def test_nothing_to_evaluate() -> None:
    assert evaluate_blocks(tiny_model(), [], unbiased=False) == {"ce": 0, "ece": 0, "tokens": 0}


@pytest.mark.parametrize("parts", [1, 3])
def test_calibration_against_the_definition(parts: int) -> None:
    rng = np.random.default_rng(1)
    confidence = rng.beta(2, 1, 600)
    confidence[:3] = [0, 1, 1 / 15]
    correct = (rng.random(600) < confidence**2).astype(float)
    calibration = Calibration()
    for one, other in zip(np.split(confidence, parts), np.split(correct, parts), strict=True):
        calibration.add(torch.from_numpy(one), torch.from_numpy(other))
    assert calibration.error() == pytest.approx(naive_ece(confidence, correct), rel=1e-12)


def test_calibration_extremes() -> None:
    assert Calibration().error() == 0
    wrong = Calibration()
    wrong.add(torch.ones(4), torch.zeros(4))
    assert wrong.error() == 1
    right = Calibration()
    right.add(torch.ones(4), torch.ones(4))
    assert right.error() == 0
