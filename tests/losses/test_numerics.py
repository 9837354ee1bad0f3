"""Rows where careless arithmetic gives NaN, inf or the wrong gradient."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from logitcache.losses import Objective, distillation_loss
from logitcache.losses.dense import dense_loss
from logitcache.targets import DeviceTargets, SparseTargets
from tests.kernels.problems import EXACT
from tests.losses.problems import BIASED, from_rows

V = 12
TAILS = (*BIASED, "unbiased")


def one_hot_head(logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden = the logits themselves, weight = identity: the head's output is exact."""
    return logits.to(dtype).requires_grad_(), torch.eye(logits.shape[1], dtype=dtype).requires_grad_()


def confident_logits(gap: float) -> torch.Tensor:
    """Row of V logits with one `gap` above the others, which differ a little."""
    others = torch.linspace(-1, 1, V, dtype=torch.float64)
    others[3] = gap
    return others[None].float().double()


def assert_finite_and_right(
    gap: float,
    dtype: torch.dtype,
    labels: torch.Tensor,
    targets: SparseTargets,
    objective: Objective,
    tolerance: float,
    impl: str = "auto",
    **options: float,
) -> None:
    """Value and gradient of each confident row are those of the definition; finite where only the gap is left.

    The gradients are those of the sum, which some implementations make in another way than those of a loss per row.
    `tolerance` is that of float32.
    """
    logits = confident_logits(gap).expand(len(labels), V)
    hidden, weight = one_hot_head(logits, dtype)
    rows, total = (
        distillation_loss(hidden, weight, labels, targets, objective, impl=impl, reduction=reduction, **options)
        for reduction in ("none", "sum")
    )
    grad = torch.autograd.grad(total, hidden)[0]
    if gap >= 300:
        assert torch.isfinite(rows).all()
        assert torch.isfinite(total)
        assert torch.isfinite(grad).all()
        return
    exact_logits = logits.clone().requires_grad_()
    exact = dense_loss(exact_logits, labels, targets.to_device(), objective, **options)
    exact_grad = torch.autograd.grad(exact.sum(), exact_logits)[0]
    tolerance = tolerance if dtype == torch.float32 else 1e-12
    assert ((rows - exact).abs() <= tolerance * exact.abs().clamp(min=1.0)).all()
    assert abs(total.item() - rows.sum().item()) <= len(labels) * tolerance * max(1.0, rows.abs().max().item())
    torch.testing.assert_close(grad.double(), exact_grad, rtol=10 * tolerance, atol=tolerance)


CONFIDENT = [
    ([3], [1.0]),
    ([3, 5], [1.0, 0.0]),
    ([3, 5], [0.5, 0.5]),
    ([0, 1], [0.6, 0.4]),
    ([], []),
    ([3, 7], [1 - 1e-6, 1e-7]),
]


def targets_of(ids: list[int], weights: list[float], tail: str, **options: object) -> SparseTargets:
    return rows_of([(ids, weights)], tail, **options)


def rows_of(rows: list[tuple[list[int], list[float]]], tail: str, **options: object) -> SparseTargets:
    made = [[np.array(ids, dtype=np.int64), np.array(weights)] for ids, weights in rows]
    return from_rows(made, unbiased=tail == "unbiased", **options)


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("gap", [0.0, 30.0, 60.0, 300.0])
def test_confident_rows_are_finite_and_right(impl, dtype, tail, gap):
    """Each row with each label; one row alone, too."""
    rows = [(row, label) for row in CONFIDENT for label in (3, 5, 9)]
    for chosen, alpha in itertools.product((rows, rows[:1]), (0.5, 1.0)):
        targets = rows_of([row for row, _ in chosen], tail)
        labels = torch.tensor([label for _, label in chosen])
        assert_finite_and_right(gap, dtype, labels, targets, Objective.forward_kl(tail), 1e-6, impl, alpha=alpha)


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("tau", [0.0, 1e-6, 0.25])
def test_bucket_where_the_student_leaves_almost_nothing_outside(impl, tau):
    """float32 inputs, P near 1e-12: the relative error of the gradient outside S stays at rounding."""
    logits = confident_logits(30.0)
    ids = torch.tensor([[3, 8]])
    hidden, weight = one_hot_head(logits, torch.float32)
    nan = torch.tensor([math.nan])
    weights = torch.tensor([[0.9, 0.1 - tau]]) if tau < 0.1 else torch.tensor([[0.5, 0.25]])
    targets = DeviceTargets(ids, weights, torch.tensor([tau]), nan, nan, torch.zeros(1), unbiased=False)
    loss = distillation_loss(hidden, weight, torch.tensor([3]), targets, alpha=1.0, impl=impl)
    grad = torch.autograd.grad(loss, hidden)[0][0].double()

    log_p = logits[0] - logits[0].logsumexp(0)
    outside = torch.tensor([v not in (3, 8) for v in range(V)])
    log_rest = log_p[outside].logsumexp(0)
    assert 1e-13 < log_rest.exp() < 1e-11
    q, tail = weights[0].double(), targets.tail_mass[0].double()
    value = (q * (q.log() - log_p[[3, 8]])).sum() + torch.special.xlogy(tail, tail) - tail * log_rest
    torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=0)
    total = q.sum() + tail
    expected = total * log_p.exp() - tail * (log_p - log_rest).exp() * outside
    expected[[3, 8]] -= q
    torch.testing.assert_close(grad[outside], expected[outside], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("impl", EXACT)
def test_a_student_that_is_right_to_1e_12_gets_that_gradient(impl):
    """dCE/dz of the label is -(1 - p): 0 in float32 arithmetic, about -1e-12 here."""
    logits = confident_logits(30.0)
    hidden, weight = one_hot_head(logits, torch.float32)
    targets = targets_of([3], [1.0], "bucket")
    for alpha in (0.5, 1.0):
        loss = distillation_loss(hidden, weight, torch.tensor([3]), targets, alpha=alpha, impl=impl)
        grad = torch.autograd.grad(loss, hidden)[0][0].double()
        p_rest = (logits[0][[v for v in range(V) if v != 3]] - 30.0).logsumexp(0).exp()
        torch.testing.assert_close(grad[3], -p_rest, rtol=1e-3, atol=0)
        torch.testing.assert_close(loss.double(), p_rest, rtol=1e-3, atol=0)


@pytest.mark.parametrize("tail", BIASED)
def test_no_columns_at_all(tail):
    """K = 0: every row is empty."""
    zero = torch.zeros(2)
    targets = DeviceTargets(
        torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0), zero + 1, zero, zero, zero, unbiased=False
    )
    hidden = torch.randn(2, 3, requires_grad=True)
    labels = torch.tensor([1, -100])
    objective = Objective.forward_kl(tail)
    loss = distillation_loss(hidden, torch.randn(5, 3), labels, targets, objective, alpha=0.5)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_stored_ids_without_any_mass_teach_nothing_when_renormalised(temperature):
    targets = targets_of([1, 4], [0.0, 0.0], "renormalised")
    hidden, weight = one_hot_head(confident_logits(5.0), torch.float64)
    objective = Objective.forward_kl("renormalised")
    loss = distillation_loss(hidden, weight, torch.tensor([3]), targets, objective, alpha=1.0, temperature=temperature)
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()


def test_weights_at_padding_are_not_read():
    ids, weights = torch.tensor([[1, -1]]), torch.tensor([[0.5, 0.4]])
    half, nan = torch.tensor([0.5]), torch.tensor([math.nan])
    losses = []
    for given in (weights, weights * torch.tensor([1.0, 0.0])):
        targets = DeviceTargets(ids, given, half, nan, nan, half, unbiased=False)
        losses.append(distillation_loss(torch.ones(1, 2), torch.eye(2).repeat(3, 1), torch.tensor([0]), targets))
    assert torch.equal(*losses)


def test_a_tail_of_rounding_over_the_whole_vocabulary_is_dropped():
    """All tokens stored, tau = 1e-7 of rounding: there is no token outside that could hold it."""
    logits = torch.zeros(1, 3, dtype=torch.float64)
    hidden, weight = one_hot_head(logits, torch.float64)
    targets = from_rows([[np.arange(3), np.full(3, 1 / 3)]], tail_mass=[1e-7])
    loss = distillation_loss(hidden, weight, torch.tensor([0]), targets, alpha=1.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert torch.isfinite(hidden.grad).all()


def test_sampled_targets_give_the_full_gradient_in_expectation():
    """Draw 12 tokens with replacement, weight count / 12: the mean gradient approaches full KL's."""
    rng = np.random.default_rng(0)
    draws, rows, columns = 12, 40_000, 6
    teacher = rng.dirichlet(np.full(columns, 0.7))
    counts = rng.multinomial(draws, teacher, size=rows)
    sampled = from_rows([[np.flatnonzero(row), row[row > 0] / draws] for row in counts], unbiased=True)
    logits = torch.randn(columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden, weight = one_hot_head(logits.expand(rows, columns).clone(), torch.float64)
    labels = torch.zeros(rows, dtype=torch.int64)
    loss = distillation_loss(hidden, weight, labels, sampled, alpha=1.0, reduction="sum")
    grad = torch.autograd.grad(loss, hidden)[0]
    full = torch.softmax(logits, 0) - torch.from_numpy(teacher)
    standard_error = grad.std(0) / math.sqrt(rows)
    assert ((grad.mean(0) - full).abs() <= 4 * standard_error + 1e-7).all()
    assert (grad.mean(0) - full).norm() < 0.02 * full.norm()
