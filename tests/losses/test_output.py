"""The sum whose gradient is made in the forward pass is the loss, for every objective; terms for logging; compiling."""

from __future__ import annotations

import pytest
import torch

from logitcache.kernels import HeadOptions, chunk
from logitcache.losses import LossOptions, Objective, distillation_output, distillation_terms
from tests.kernels.problems import EXACT
from tests.losses.problems import HEADS, OBJECTIVES, N, Problem

BUCKET = Objective.forward_kl("bucket")


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(chunk, "chunk_rows", lambda rows, *_: 3)


def assert_same(found: torch.Tensor, expected: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for left, right in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert (left - right).norm() <= 1e-10 * right.norm()


# tests/kernels/test_chunk.py has the other heads.
@pytest.mark.parametrize(("head", "alpha"), [("plain", 1.0), ("plain", "rows"), ("all", 0.7), ("all", "rows")])
@pytest.mark.parametrize(("objective", "temperature"), OBJECTIVES)
def test_chunked_loss_is_its_definition(head, objective, temperature, alpha):
    problem = Problem(objective, temperature, HEADS[head])
    alpha = torch.linspace(0, 1, N, dtype=torch.float64) if alpha == "rows" else alpha
    assert_same(problem.loss(impl="chunk", alpha=alpha), problem.dense(alpha).sum() / 7, problem.leaves)


@pytest.mark.parametrize(
    ("options", "divisor"),
    [({"reduction": "sum"}, 1), ({"normalizer": 40}, 40), ({"normalizer": torch.tensor([9.0])}, 9)],
)
def test_reductions_of_the_chunked_loss(options, divisor):
    problem = Problem(BUCKET)
    assert_same(problem.loss(impl="chunk", **options), problem.dense(0.9).sum() / divisor, problem.leaves)


def test_a_loss_per_row_and_a_learned_alpha_keep_their_graph():
    """What the chunked sum cannot do is computed by the bare primitive, not wrongly."""
    problem = Problem(BUCKET)
    weights_N = torch.linspace(-1, 1, N, dtype=torch.float64)
    rows_N = problem.loss(impl="chunk", reduction="none")
    assert_same((rows_N * weights_N).sum(), (problem.dense(0.9) * weights_N).sum(), problem.leaves)
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(problem.loss(impl="chunk", alpha=alpha), alpha)[0]
    torch.testing.assert_close(found, (problem.dense(1.0) - problem.dense(0.0)).sum() / 7)


@pytest.mark.parametrize("impl", ["auto", *EXACT])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_output_holds_the_terms(impl, alpha):
    problem = Problem(BUCKET)
    options = LossOptions(BUCKET, alpha=alpha, impl=impl, z_loss=1e-2)
    output = distillation_output(
        problem.hidden, problem.weight, problem.labels, problem.targets, options, HeadOptions(problem.bias)
    )
    torch.testing.assert_close(output.loss, problem.loss(alpha=alpha, z_loss=1e-2))
    torch.testing.assert_close(output.terms.loss(alpha), output.loss)
    assert output.terms.counted.tolist() == [True] * 7 + [False]
    assert (output.terms.ce is None) == (alpha == 1)
    assert (output.terms.divergence is None) == (alpha == 0)
    assert output.terms.z_loss is not None


@pytest.mark.parametrize("impl", EXACT)
def test_without_a_graph(impl):
    problem = Problem(BUCKET)
    with torch.no_grad():
        loss = problem.loss(impl=impl)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, problem.loss(impl=impl).detach())


# What a loss does besides its divergence, whose every form tests/losses/test_compile.py compiles by itself.
COMPILED = [
    ("split", Objective.forward_kl("blend"), 1.0),
    ("split", Objective.decoupled(), 2.0),
    ("split", Objective.cross_entropy(), 1.0),
    ("chunk", BUCKET, 1.0),
    ("chunk", Objective.policy_gradient(), 1.0),
]


@pytest.mark.parametrize(("impl", "objective", "temperature"), COMPILED)
def test_compiles_without_a_graph_break(impl, objective, temperature, monkeypatch):
    # Two chunks, as each is traced.
    monkeypatch.setattr(chunk, "chunk_rows", lambda rows, *_: 4)
    torch.compiler.reset()
    problem = Problem(objective, temperature)
    targets = problem.device_targets

    def run(hidden, weight, bias, labels, alpha):
        options = LossOptions(objective, alpha=alpha, impl=impl)
        return distillation_output(hidden, weight, labels, targets, options, HeadOptions(bias)).loss

    arguments = (*problem.leaves, problem.labels, torch.tensor(0.7, dtype=torch.float64))
    assert_same(torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments), run(*arguments), problem.leaves)


def test_terms_have_a_graph_where_the_sum_has_none():
    problem = Problem(BUCKET)
    terms = distillation_terms(
        problem.hidden, problem.weight, problem.labels, problem.targets, BUCKET, head=HeadOptions(problem.bias)
    )
    assert_same(terms.loss(0.9), problem.loss(impl="chunk"), problem.leaves)
