"""One varopt cache for two objectives: the whole sample, or its exact head and a bucket for the rest."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from logitcache.errors import ObjectiveError, TargetsError
from logitcache.losses import Objective, distillation_loss
from logitcache.losses.dense import dense_loss
from logitcache.selection import Selection
from logitcache.selection.distribution import Distribution
from logitcache.selection.select import select
from logitcache.targets import DeviceTargets, SparseTargets
from tests.kernels.problems import EXACT as IMPLEMENTATIONS
from tests.losses.problems import (
    HEADS,
    OF_HEADS,
    N,
    Problem,
    V,
    from_rows,
    name_of,
    teacher_probs,
    varopt_targets,
)
from tests.losses.test_gradients import assert_same

BUCKET = Objective.forward_kl("bucket")


def by_hand(probs: np.ndarray, targets: SparseTargets) -> SparseTargets:
    """The head, taken from the distribution itself: every id above the row's threshold."""
    rows, tails = [], []
    for row, tau in zip(probs, targets.threshold, strict=False):
        head = row > tau
        rows.append([np.flatnonzero(head), row[head]])
        tails.append(row[~head].sum(dtype=np.float64))
    return from_rows([*rows, [[], []]], tail_mass=[*tails, 0.0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_the_bucket_loss_of_a_varopt_row_is_that_of_its_head(impl: str, head: str, alpha: float) -> None:
    """Values and gradients against the dense float64 definition on the head, from SparseTargets and on the device."""
    problem = Problem(BUCKET, head=HEADS[head])
    columns = HEADS[head].get("valid_vocab", V)
    targets = varopt_targets(teacher_probs(columns))
    assert targets.has_exact_head
    lengths = targets.exact_head().row_lengths
    assert lengths[4] == 0
    assert lengths[5] == 3
    assert len(set(lengths)) > 3
    problem.targets = targets.exact_head()
    for given in (targets, targets.to_device(), replace(targets.to_device(), has_exact_head=None)):
        mine = problem.loss(targets=given, impl=impl, alpha=alpha, reduction="none")
        assert_same(mine, problem.dense(alpha), problem.leaves)


@pytest.mark.parametrize(("objective", "temperature"), OF_HEADS, ids=name_of)
def test_objectives_over_classes_read_the_head_too(objective: Objective, temperature: float) -> None:
    problem = Problem(objective, temperature)
    targets = varopt_targets(teacher_probs(V))
    problem.targets = targets.exact_head()
    mine = problem.loss(targets=targets, alpha=0.7, reduction="none")
    assert_same(mine, problem.dense(0.7), problem.leaves)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("head", HEADS)
def test_the_ends_of_a_blend(impl: str, head: str) -> None:
    """One pass over the head for both terms, and at its ends what each of them is alone."""
    problem = Problem(Objective.forward_kl("blend"), head=HEADS[head])
    for share, tail in (
        (0.0, "bucket"),
        (1.0, "unbiased"),
        (torch.zeros(N), "bucket"),
        (torch.tensor(1.0), "unbiased"),
    ):
        mine = problem.loss(impl=impl, alpha=0.8, reduction="none", blend=share)
        end = problem.loss(impl=impl, alpha=0.8, reduction="none", objective=Objective.forward_kl(tail))
        torch.testing.assert_close(mine, end, rtol=1e-12, atol=1e-13)
        for a, b in zip(
            torch.autograd.grad(mine.sum(), problem.leaves), torch.autograd.grad(end.sum(), problem.leaves), strict=True
        ):
            assert (a - b).norm() <= 1e-12 * b.norm()


def test_a_blend_moves_with_its_rows() -> None:
    problem = Problem(Objective.forward_kl("blend"))
    ends = [problem.loss(alpha=1.0, reduction="none", blend=share) for share in (0.0, 1.0)]
    share = torch.linspace(0, 1, N)
    mixed = problem.loss(alpha=1.0, reduction="none", blend=share)
    torch.testing.assert_close(mixed, (1 - share) * ends[0] + share * ends[1])
    assert (ends[0][:4] - ends[1][:4]).abs().min() > 1e-3
    torch.testing.assert_close(problem.loss(blend=torch.tensor(0.25)), problem.loss(blend=0.25))


def test_the_head_is_what_the_distribution_says() -> None:
    probs = teacher_probs(V)
    targets = varopt_targets(probs)
    head, expected = targets.exact_head(), by_hand(probs, targets)
    np.testing.assert_array_equal(head.offsets, expected.offsets)
    np.testing.assert_array_equal(head.ids, expected.ids)
    np.testing.assert_allclose(head.weights, expected.weights, rtol=1e-6)
    # The confident row's tail too: 1 - head would be 0 there.
    np.testing.assert_allclose(head.tail_mass, expected.tail_mass, rtol=1e-5)
    assert (head.unbiased, head.has_exact_head) == (False, True)
    np.testing.assert_array_equal(head.threshold, 0)
    assert head.exact_head() is head


def test_the_device_view_has_the_same_head() -> None:
    targets = varopt_targets(teacher_probs(V))
    columns = {"label_logprob": np.linspace(-3, -1, N), "entropy": np.linspace(0, 2, N)}
    targets = targets.with_columns(**columns)
    mine, right = targets.to_device().exact_head(), targets.exact_head().to_device()
    width = right.ids.shape[1]
    assert torch.equal(mine.ids[:, :width], right.ids)
    assert torch.equal(mine.weights[:, :width], right.weights)
    assert (mine.ids[:, width:] == -1).all()
    for name in ("tail_mass", "label_logprob", "entropy", "threshold"):
        assert torch.equal(getattr(mine, name), getattr(right, name))
    assert not mine.unbiased
    assert mine.exact_head() is mine


def test_samples_without_an_exact_head_are_refused() -> None:
    sampled = from_rows([[[1, 3], [0.5, 0.5]], [[], []]], unbiased=True)
    assert not sampled.has_exact_head
    with pytest.raises(TargetsError, match=r"^row 0 holds samples of which none is exact; dump .* --select varopt:K"):
        sampled.exact_head()
    hidden, weight, labels = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([1, -100])
    for given in (sampled, sampled.to_device(), replace(sampled.to_device(), has_exact_head=None)):
        with pytest.raises(ObjectiveError, match=r"dump a cache with --select varopt:K \(it serves both\)"):
            distillation_loss(hidden, weight, labels, given, BUCKET)


def test_what_was_not_looked_at_cannot_train_in_silence() -> None:
    """On a GPU nobody looks at thresholds: rows that have none give a loss of NaN, not one without a teacher."""
    zero, inf = torch.zeros(2), torch.full((2,), math.inf)
    ids, weights = torch.tensor([[1, 3], [-1, -1]]), torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    believed = DeviceTargets(ids, weights, zero, zero, zero, inf, unbiased=True, has_exact_head=True)
    for objective, _ in [*OF_HEADS, (Objective.forward_kl("blend"), 1.0)]:
        arguments = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([1, 2]), believed, objective
        loss = distillation_loss(*arguments, reduction="none")
        assert loss.isnan().tolist() == [True, False], objective


def test_the_mean_gradient_of_varopt_rows_is_that_of_the_full_divergence() -> None:
    rows, columns = 20_000, 9
    probs = np.random.default_rng(0).dirichlet(np.full(columns, 0.6)).astype(np.float32)
    dist = Distribution.from_logits(torch.from_numpy(probs).log().expand(rows, -1))
    targets = select(Selection("varopt", 3), dist, np.random.default_rng(1).random((rows, 1)))
    logits = torch.randn(columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = logits.expand(rows, columns).clone().requires_grad_()
    labels = torch.zeros(rows, dtype=torch.int64)
    loss = distillation_loss(
        hidden, torch.eye(columns, dtype=torch.float64), labels, targets, alpha=1.0, reduction="sum"
    )
    grad = torch.autograd.grad(loss, hidden)[0]
    full = torch.softmax(logits, 0) - torch.from_numpy(probs).double()
    assert ((grad.mean(0) - full).abs() <= 4 * grad.std(0) / math.sqrt(rows) + 1e-7).all()
    assert (grad.mean(0) - full).norm() < 0.02 * full.norm()


def test_dense_definition_of_the_bucket_at_the_head() -> None:
    """One row by hand: KL over the head's classes and one class for the rest."""
    targets = from_rows([[[0, 2, 3], [0.5, 0.25, 0.25]]], unbiased=True, threshold=[0.25])
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5]], dtype=torch.float64)
    p = torch.softmax(logits[0], 0)
    expected = 0.5 * torch.log(0.5 / p[0]) + 0.5 * torch.log(0.5 / (1 - p[0]))
    loss = distillation_loss(logits, torch.eye(5, dtype=torch.float64), torch.tensor([1]), targets, BUCKET, alpha=1.0)
    torch.testing.assert_close(loss, expected)
    dense = dense_loss(logits, torch.tensor([1]), targets.exact_head().to_device(), BUCKET, alpha=1.0)
    torch.testing.assert_close(dense[0], expected)
