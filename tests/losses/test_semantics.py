"""alpha, reduction, normalizer, ignored rows, what labels and targets are read for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import logitcache
from logitcache.losses import HeadOptions, Objective, distillation_loss, distillation_terms
from logitcache.targets import SparseTargets
from tests.kernels.problems import EXACT as IMPLEMENTATIONS
from tests.losses.problems import OBJECTIVES, D, N, Problem, V, name_of

BUCKET = Objective.forward_kl("bucket")


def gradients(loss: torch.Tensor, problem: Problem) -> list[torch.Tensor]:
    return [loss, *torch.autograd.grad(loss, problem.leaves)]


def assert_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("how", ["alpha", "objective"])
def test_alpha_zero_on_the_reference_is_torch_cross_entropy_bit_for_bit(dtype, reduction, how):
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(301, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 301, (37,))
    labels[5:9] = -100
    options = {"alpha": 0} if how == "alpha" else {"objective": Objective.cross_entropy(), "alpha": 0.3}
    mine = distillation_loss(hidden, weight, labels, None, impl="reference", reduction=reduction, **options)
    theirs = F.cross_entropy(hidden @ weight.T, labels, reduction=reduction)
    assert mine.dtype == dtype
    if reduction != "sum":
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(mine, theirs)
    for a, b in zip(
        torch.autograd.grad(mine.sum(), (hidden, weight)),
        torch.autograd.grad(theirs.sum(), (hidden, weight)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_alpha_zero_on_split_is_the_cross_entropy_objective():
    problem = Problem(BUCKET)
    zero = gradients(problem.loss(alpha=0.0, impl="split"), problem)
    assert_equal(zero, gradients(problem.loss(objective=Objective.cross_entropy(), alpha=0.4, impl="split"), problem))
    assert_equal(zero, gradients(problem.loss(alpha=0, targets=None, objective=None, impl="split"), problem))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "objective", [objective for objective, _ in OBJECTIVES if not objective.reads_labels], ids=name_of
)
def test_alpha_one_reads_no_label(impl, objective):
    problem = Problem(objective)
    one = gradients(problem.loss(alpha=1.0, impl=impl), problem)
    other = torch.where(problem.labels == -100, -100, 10**6)
    assert_equal(one, gradients(problem.loss(alpha=1.0, impl=impl, labels=other), problem))
    almost = gradients(problem.loss(alpha=torch.tensor(1.0), impl=impl), problem)
    for a, b in zip(one, almost, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_alpha_mixes_linearly(impl):
    problem = Problem(Objective.forward_kl("renormalised"), temperature=2.0)
    ce, divergence = (problem.loss(alpha=alpha, impl=impl, reduction="none") for alpha in (0.0, 1.0))
    torch.testing.assert_close(problem.loss(alpha=0.3, impl=impl, reduction="none"), 0.7 * ce + 0.3 * divergence)
    rows = torch.linspace(0, 1, N)
    mixed = problem.loss(alpha=rows, impl=impl, reduction="none")
    torch.testing.assert_close(mixed, (1 - rows) * ce + rows * divergence)
    torch.testing.assert_close(problem.loss(alpha=torch.tensor(0.25)), problem.loss(alpha=0.25))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_reductions(impl, alpha):
    problem = Problem(BUCKET)
    rows = problem.loss(alpha=alpha, impl=impl, reduction="none")
    assert rows.shape == (N,)
    assert rows[7] == 0
    torch.testing.assert_close(problem.loss(alpha=alpha, impl=impl, reduction="sum"), rows.sum())
    torch.testing.assert_close(problem.loss(alpha=alpha, impl=impl), rows.sum() / 7)
    torch.testing.assert_close(problem.loss(alpha=alpha, impl=impl, normalizer=40), rows.sum() / 40)
    torch.testing.assert_close(problem.loss(alpha=alpha, impl=impl, normalizer=torch.tensor([40])), rows.sum() / 40)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("objective", "temperature"), [*OBJECTIVES, (Objective.cross_entropy(), 1.0)], ids=name_of)
def test_ignored_rows_count_for_neither_term(impl, objective, temperature):
    problem = Problem(objective, temperature)
    full = problem.loss(impl=impl, reduction="sum")
    grad = torch.autograd.grad(full, problem.hidden)[0]
    assert (grad[7] == 0).all()
    assert (grad[:6].abs().sum(1) > 0).any()
    other = problem.loss(impl=impl, ignore_index=-1, labels=problem.labels.masked_fill(problem.labels == -100, -1))
    torch.testing.assert_close(other, full / 7)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_counts(impl, alpha, reduction):
    problem = Problem(BUCKET)
    loss = problem.loss(impl=impl, alpha=alpha, reduction=reduction, labels=torch.full((N,), -100))
    assert loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, problem.leaves))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_no_rows(impl, alpha):
    weight = torch.randn(V, D, requires_grad=True)
    targets = SparseTargets(offsets=[0], ids=[], weights=[])
    labels = torch.zeros(0, dtype=torch.int64)
    loss = distillation_loss(torch.zeros(0, D), weight, labels, targets, alpha=alpha, impl=impl)
    loss.backward()
    assert loss == 0
    assert (weight.grad == 0).all()


def test_the_default_objective_suits_the_targets():
    biased, sampled = Problem(BUCKET), Problem(Objective.forward_kl("unbiased"))
    assert torch.equal(biased.loss(objective=None), biased.loss())
    assert torch.equal(sampled.loss(objective=None), sampled.loss())


def test_device_targets_and_sparse_targets_are_the_same():
    problem = Problem(BUCKET)
    assert torch.equal(problem.loss(), problem.loss(targets=problem.device_targets))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("objective", "temperature"), OBJECTIVES, ids=name_of)
def test_terms_compose_the_loss(alpha, objective, temperature):
    problem = Problem(objective, temperature)
    terms = distillation_terms(
        problem.hidden,
        problem.weight,
        problem.labels,
        problem.targets,
        objective,
        temperature,
        head=HeadOptions(problem.bias),
    )
    assert terms.z_loss is None
    assert terms.counted.tolist() == [True] * 7 + [False]
    torch.testing.assert_close(terms.ce, problem.loss(alpha=0.0, reduction="none"))
    torch.testing.assert_close(terms.divergence * temperature**2, problem.loss(alpha=1.0, reduction="none"))
    torch.testing.assert_close(terms.loss(alpha), problem.loss(alpha=alpha))
    torch.testing.assert_close(terms.loss(alpha, normalizer=3.0), problem.loss(alpha=alpha, normalizer=3.0))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("objective", [Objective.cross_entropy(), BUCKET, Objective.tvd()])
def test_z_loss_is_a_term_of_its_own(impl, objective):
    """c * lse^2 on every counted row, added after the mix: alpha does not scale it."""
    problem = Problem(objective)
    arguments = problem.hidden, problem.weight, problem.labels, problem.targets, objective
    terms = distillation_terms(*arguments, impl=impl, head=HeadOptions(problem.bias), z_loss=0.25)
    expected = 0.25 * problem.logits().logsumexp(1) ** 2 * terms.counted
    torch.testing.assert_close(terms.z_loss, expected)
    for alpha in (0.0, 0.3, 1.0):
        with_z, without = (problem.loss(alpha=alpha, impl=impl, reduction="none", z_loss=c) for c in (0.25, 0.0))
        torch.testing.assert_close(with_z - without, expected)
        torch.testing.assert_close(terms.loss(alpha), problem.loss(alpha=alpha, impl=impl, z_loss=0.25))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_types(dtype, impl):
    problem = Problem(BUCKET)
    hidden = problem.hidden.detach().to(dtype).requires_grad_()
    weight = problem.weight.detach().to(dtype).requires_grad_()
    loss = distillation_loss(hidden, weight, problem.labels, problem.targets, impl=impl)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_reached_from_the_package():
    assert logitcache.losses.distillation_loss is distillation_loss
