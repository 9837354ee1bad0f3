"""Objectives over classes, decoupled, mse and policy gradient where careless arithmetic gives NaN, inf or noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from logitcache.losses import Objective, distillation_loss
from logitcache.targets import DeviceTargets, SparseTargets
from tests.losses.problems import OBJECTIVES, from_rows, name_of, one_row
from tests.losses.test_numerics import V, assert_finite_and_right, confident_logits, one_hot_head

NEW = [pair for pair in OBJECTIVES if pair[0].kind != "forward_kl" or pair[0].tail == "blend"]
BUCKETS = [pair[0] for pair in NEW if pair[0].tail == "bucket" or (pair[0].kind == "decoupled" and pair[1] == 1)]
ROWS = {
    "right": ([3], [1.0], None),
    "right, tail 1e-9": ([3], [1.0], 1e-9),
    "zero stored": ([3, 5], [1.0, 0.0], None),
    "split": ([3, 5], [0.5, 0.5], None),
    "wrong": ([0, 1], [0.6, 0.4], None),
    "nothing": ([], [], None),
    "tiny": ([3, 7, 8], [1 - 1e-6, 1e-7, 1e-7], None),
    "everything": (list(range(V)), [1 / V] * V, 1e-7),
}


@pytest.mark.parametrize(("objective", "temperature"), NEW, ids=name_of)
def test_confident_rows_are_finite_and_right(objective: Objective, temperature: float) -> None:
    made = [
        one_row(ids, weights, objective, **({} if tail is None else {"tail_mass": [tail]}))
        for ids, weights, tail in ROWS.values()
    ]
    targets, labels = SparseTargets.concatenate(made), torch.full((len(made),), 3)
    options = {"alpha": 1.0, "temperature": temperature}
    for gap, dtype in itertools.product((0.0, 30.0, 60.0, 300.0), (torch.float32, torch.float64)):
        assert_finite_and_right(gap, dtype, labels, targets, objective, 2e-6, **options)


@pytest.mark.parametrize("tau", [1e-30, 1e-9, 0.25])
@pytest.mark.parametrize("objective", BUCKETS, ids=name_of)
def test_a_student_that_leaves_almost_nothing_outside(objective: Objective, tau: float) -> None:
    """float32 inputs, P near 1e-12: outside S the gradient is (a_tail - sum of p a) p, to rounding of each factor."""
    logits = confident_logits(30.0)
    hidden, weight = one_hot_head(logits, torch.float32)
    q = torch.tensor([0.5 if tau > 0.1 else 0.75, 0.25])
    nan, zero = torch.tensor([math.nan]), torch.zeros(1)
    targets = DeviceTargets(torch.tensor([[3, 8]]), q[None], torch.tensor([tau]), nan, nan, zero, unbiased=False)
    loss = distillation_loss(hidden, weight, torch.tensor([3]), targets, objective, alpha=1.0)
    grad = torch.autograd.grad(loss, hidden)[0][0].double()

    log_p = logits[0] - logits[0].logsumexp(0)
    outside = torch.tensor([v not in (3, 8) for v in range(V)])
    log_b = torch.cat([log_p[[3, 8]], log_p[outside].logsumexp(0)[None]]).requires_grad_()
    assert 1e-13 < log_b[2].exp() < 1e-11
    q_b = torch.cat([q.double(), targets.tail_mass.double()])
    a = torch.autograd.grad(phi(objective, log_b, q_b), log_b)[0] / log_b.detach().exp()
    mean = (log_b.detach().exp() * a).sum()
    expected = (a[2] - mean) * log_p.exp()
    bound = 1e-4 * expected.abs() + 1e-15 * log_p.exp()
    assert ((grad - expected).abs() <= bound)[outside].all()


def phi(objective: Objective, log_p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The divergence of classes, of p and its logarithm."""
    p, beta = log_p.exp(), objective.beta
    if objective.kind == "decoupled":
        return -(q * log_p).sum()
    if objective.kind == "tvd":
        return (p - q).abs().sum() / 2
    if objective.kind == "jsd":
        m = beta * q + (1 - beta) * p
        return (1 - beta) * (p * (log_p - m.log())).sum() - beta * (q * m.log()).sum()
    if objective.kind == "skew_kl" and not objective.reverse:
        return -(q * (beta * q + (1 - beta) * p).log()).sum()
    m = q if objective.kind == "reverse_kl" else (1 - beta) * q + beta * p
    return (p * (log_p - m.log())).sum()


@pytest.mark.parametrize("objective", [kind for kind in BUCKETS if kind.kind != "tvd"], ids=name_of)
def test_a_student_close_to_the_teacher(objective: Objective) -> None:
    """float32 inputs, 1e-4 apart: the gradient, a difference of nearly equal numbers, is right to a tenth of a percent.

    Every divergence here is, to second order, c / 2 times the sum of (p - q)^2 / q.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, V, generator=generator).float()
    q = torch.softmax(logits.double(), 1).float()
    hidden = (logits + 1e-4 * torch.randn(40, V, generator=generator)).requires_grad_()
    rows = [[np.arange(V - 4), row[:-4]] for row in q.numpy()]
    targets = from_rows(rows, tail_mass=q[:, -4:].double().sum(1).float().numpy())
    loss = distillation_loss(
        hidden, torch.eye(V), torch.zeros(40, dtype=torch.int64), targets, objective, alpha=1.0, reduction="sum"
    )
    grad = torch.autograd.grad(loss, hidden)[0].double()
    p = torch.softmax(hidden.detach().double(), 1)
    ratio = torch.cat([q[:, :-4].double() / p[:, :-4], targets_tail(q, p)], dim=1)
    gap = p * (1 - ratio)
    beta = objective.beta
    curvature = {"jsd": lambda: beta * (1 - beta), "skew_kl": lambda: (1 - beta) ** 2}.get(
        objective.kind, lambda: 1.0
    )()
    expected = curvature * (gap - p * gap.sum(1, keepdim=True))
    assert (grad - expected).norm() <= 1e-3 * expected.norm()


def targets_tail(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Teacher over student of the last four ids, which share a class."""
    return (q[:, -4:].double().sum(1, keepdim=True) / p[:, -4:].sum(1, keepdim=True)).expand(-1, 4)


READ_AS = 2.0**-24
UNIFORM = torch.zeros(1, V, dtype=torch.float64)


def loss_of(objective: Objective, ids: list[int], weights: list[float], **options: object) -> float:
    targets = one_row(ids, weights, objective, **options)
    head = torch.eye(V, dtype=torch.float64)
    return distillation_loss(UNIFORM, head, torch.tensor([0]), targets, objective, alpha=1.0).item()


@pytest.mark.parametrize("objective", [Objective.reverse_kl(), Objective.skew_kl(0.0, reverse=True)], ids=name_of)
def test_what_storage_rounded_to_zero_is_read_as(objective: Objective) -> None:
    """tau = 0 and q = 0 are read as 2^-24; a small number that was stored is not."""
    p, rest = 1 / V, (V - 1) / V
    assert loss_of(objective, [3], [1.0]) == pytest.approx(p * math.log(p) + rest * math.log(rest / READ_AS), rel=1e-12)
    two = p * math.log(p) + p * math.log(p / READ_AS) + (V - 2) * p * math.log((V - 2) * p / READ_AS)
    assert loss_of(objective, [3, 5], [1.0, 0.0]) == pytest.approx(two, rel=1e-12)
    stored = float(np.float32(1e-30))
    kept = p * math.log(p) + rest * math.log(rest / stored)
    assert loss_of(objective, [3], [1.0], tail_mass=[1e-30]) == pytest.approx(kept, rel=1e-12)
    renormalised = Objective.reverse_kl("renormalised")
    half = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / READ_AS)
    assert loss_of(renormalised, [3, 5], [0.25, 0.0]) == pytest.approx(half - 0.5 * math.log(4), rel=1e-12)


@pytest.mark.parametrize("beta", [1e-9, 0.1, 0.5])
def test_nothing_is_read_into_a_zero_where_the_divergence_is_finite(beta: float) -> None:
    p, rest = 1 / V, (V - 1) / V
    reverse = p * math.log(p / (1 - beta + beta * p)) - rest * math.log(beta)
    assert loss_of(Objective.skew_kl(beta, reverse=True), [3], [1.0]) == pytest.approx(reverse, rel=1e-9)
    assert loss_of(Objective.skew_kl(beta), [3], [1.0]) == pytest.approx(-math.log(beta + (1 - beta) * p), rel=1e-9)
    mixture = beta + (1 - beta) * p
    jsd = -beta * math.log(mixture)
    jsd += (1 - beta) * (p * math.log(p / mixture) - rest * math.log(1 - beta))
    assert loss_of(Objective.jsd(beta), [3], [1.0]) == pytest.approx(jsd, rel=1e-9)
    assert loss_of(Objective.tvd(), [3], [1.0]) == pytest.approx(rest, rel=1e-12)


@pytest.mark.parametrize(("objective", "temperature"), [pair for pair in NEW if pair[0].tail != "blend"], ids=name_of)
def test_no_columns_at_all(objective: Objective, temperature: float) -> None:
    """K = 0: every row is empty."""
    zero = torch.zeros(2)
    targets = DeviceTargets(
        torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0), zero + 1, zero - 1, zero, zero, unbiased=False
    )
    hidden = torch.randn(2, 3, requires_grad=True)
    labels = torch.tensor([1, -100])
    loss = distillation_loss(hidden, torch.randn(5, 3), labels, targets, objective, 0.5, temperature)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize(("objective", "temperature"), NEW, ids=name_of)
def test_nothing_counts_and_no_rows(objective: Objective, temperature: float) -> None:
    """A loss of 0 with a graph, z-loss included."""
    targets = one_row([1, 4], [0.5, 0.25], objective)
    weight = torch.randn(5, 3, requires_grad=True)
    for rows in (1, 0):
        hidden, labels = torch.randn(rows, 3, requires_grad=True), torch.full((rows,), -100)
        options = {"alpha": 0.5, "temperature": temperature, "z_loss": 0.1}
        loss = distillation_loss(hidden, weight, labels, targets.slice(0, rows), objective, **options)
        assert loss == 0
        for grad in torch.autograd.grad(loss, (hidden, weight)):
            assert (grad == 0).all()


def test_a_label_that_the_teacher_does_not_know_spoils_no_other_row() -> None:
    """label_logprob is NaN where there is no label; where nobody may look (a GPU), a counted NaN row is NaN."""
    nan, zero = math.nan, torch.zeros(3)
    ids = torch.full((3, 1), -1)
    targets = DeviceTargets(ids, torch.zeros(3, 1), zero, torch.tensor([-1.0, nan, -2.0]), zero, zero, unbiased=False)
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, -100, 2])
    loss = distillation_loss(
        hidden, torch.randn(5, 4, dtype=torch.float64), labels, targets, Objective.policy_gradient(), 0.7
    )
    grad = torch.autograd.grad(loss, hidden)[0]
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()
    assert (grad[1] == 0).all()
    assert (grad[[0, 2]] != 0).any(1).all()
