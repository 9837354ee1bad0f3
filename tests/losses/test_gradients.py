"""Every objective against its dense definition: values and gradients, on every implementation."""

from __future__ import annotations

import pytest
import torch

from logitcache.kernels import slices
from logitcache.losses import Objective
from tests.kernels.problems import EXACT
from tests.losses.problems import HEADS, OBJECTIVES, N, Problem, name_of

WIDTHS = [1, 5, 1024]


@pytest.fixture(autouse=True, params=[5])
def narrow_slices(request, monkeypatch):
    monkeypatch.setattr(slices, "MIN_COLUMNS", request.param)
    monkeypatch.setattr(slices, "TILE_BYTES_CPU", 0)


def assert_same(mine: torch.Tensor, right: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)
    for found, exact in zip(
        torch.autograd.grad(mine.sum(), leaves), torch.autograd.grad(right.sum(), leaves), strict=True
    ):
        assert (found - exact).norm() <= 1e-10 * exact.norm()


# Every objective with all options of the head and with none; each option alone with one objective of each tail.
BY_TAIL = {objective.tail: (objective, temperature) for objective, temperature in OBJECTIVES}
WITH_HEADS = [
    (head, *pair) for head in HEADS for pair in (OBJECTIVES if head in ("plain", "all") else BY_TAIL.values())
]


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize(("head", "objective", "temperature"), WITH_HEADS, ids=name_of)
def test_objective_is_its_definition(impl, head, objective, temperature):
    problem = Problem(objective, temperature, HEADS[head])
    options = {"blend": torch.linspace(0, 1, N, dtype=torch.float64), "z_loss": 0.01}
    alpha = torch.linspace(0.1, 1, N, dtype=torch.float64)
    mine = problem.loss(impl=impl, alpha=alpha, reduction="none", **options)
    assert_same(mine, problem.dense(alpha, **options), problem.leaves)


@pytest.mark.parametrize("narrow_slices", WIDTHS, indirect=True)
@pytest.mark.parametrize(("head", "alpha"), [("plain", 1.0), ("all", 0.7)])
@pytest.mark.parametrize(("objective", "temperature"), OBJECTIVES, ids=name_of)
def test_slices_of_any_width(head, objective, temperature, alpha):
    problem = Problem(objective, temperature, HEADS[head])
    assert_same(problem.loss(impl="split", alpha=alpha, reduction="none"), problem.dense(alpha), problem.leaves)


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_cross_entropy_is_its_definition(impl, head, z_loss):
    problem = Problem(Objective.cross_entropy(), 1.0, HEADS[head])
    mine = problem.loss(impl=impl, reduction="none", targets=None, z_loss=z_loss)
    assert_same(mine, problem.dense(0.5, z_loss=z_loss), problem.leaves)


# The advantage of a policy gradient is held fixed in its gradient, not in its value.
WHOLE_GRADIENTS = [pair for pair in OBJECTIVES if pair[0].kind != "policy_gradient"]


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize(("objective", "temperature"), WHOLE_GRADIENTS, ids=name_of)
def test_gradient_is_that_of_the_reported_loss(impl, objective, temperature):
    """Central differences of the number the user sees: catches a T^2 in one of value and gradient only."""
    problem = Problem(objective, temperature)
    options = {"impl": impl, "z_loss": 0.01, "blend": 0.3}
    grad = torch.autograd.grad(problem.loss(**options), problem.weight)[0]
    direction = torch.randn(grad.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        start, step = problem.weight.clone(), 1e-6
        ends = []
        for sign in (1, -1):
            problem.weight.copy_(start + sign * step * direction)
            ends.append(problem.loss(**options))
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(slope, (grad * direction).sum(), rtol=1e-6, atol=1e-9)


def test_closed_form_of_the_bucket_gradient():
    """dL/dz = (1 - tau/P) p + 1_S ((tau/P) p - q), the published form ('ghost token')."""
    problem = Problem(Objective.forward_kl("bucket"))
    grad = torch.autograd.grad(problem.loss(alpha=1.0, reduction="sum"), problem.bias)[0]
    p = torch.softmax(problem.hidden @ problem.weight.T + problem.bias, 1).detach()
    expected = torch.zeros(19, dtype=torch.float64)
    targets = problem.device_targets
    for row in range(N - 1):
        ids = targets.ids[row][targets.ids[row] >= 0]
        q, tau = targets.weights[row][: len(ids)].double(), targets.tail_mass[row].double()
        ratio = tau / (1 - p[row, ids].sum()) if len(ids) < 19 else torch.zeros(())
        expected += (1 - ratio) * p[row]
        expected[ids] += ratio * p[row, ids] - q
        # The form assumes sum(q) + tau = 1, which float32 storage breaks by rounding.
        expected += (q.sum() + tau - 1) * p[row]
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)
