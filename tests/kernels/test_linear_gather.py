"""The primitive: definition, gradients of both implementations, shapes at the edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from logitcache.kernels import HeadOptions, dense_logits, head_entropy, head_statistics, linear_gather
from tests.kernels.problems import EXACT, HEADS, LargestTensor, Problem, make_problem, mix

CASES = [("reference", None), ("chunk", None), *(("split", width) for width in (None, 1, 4, 5, 22, 23))]


def test_implementations_named_here_are_all_there_are():
    assert {name for name, _ in CASES} == set(EXACT)


@pytest.mark.parametrize(("impl", "width"), CASES)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values_are_the_definition(impl, width, name, temperature):
    head = HEADS[name]
    problem = make_problem(columns=head.columns(torch.empty(23, 1)))
    result = problem.run(head, impl=impl, slice_width=width, temperature=temperature)
    columns = head.valid_vocab or 23
    for row in range(5):
        logits = (problem.hidden[row] @ problem.weight.T + problem.bias)[:columns] * (head.logit_scale or 1)
        if head.softcap:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        outside = [v for v in range(columns) if v not in problem.ids[row].tolist()]
        torch.testing.assert_close(result.lse_rest[row], logits[outside].exp().sum().log())
        torch.testing.assert_close(result.lse_rest_T[row], (logits[outside] / temperature).exp().sum().log())
        for k, token in enumerate(problem.ids[row].tolist()):
            expected = torch.tensor(float("-inf"), dtype=torch.float64) if token < 0 else logits[token]
            torch.testing.assert_close(result.z[row, k], expected)


def test_at_temperature_one_both_logsumexps_are_one_tensor():
    for impl in EXACT:
        result = make_problem().run(HeadOptions(), impl=impl)
        assert result.lse_rest is result.lse_rest_T


@pytest.mark.parametrize(("impl", "width"), [("reference", None), ("split", 5), ("chunk", None)])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_gradcheck(impl, width, name, temperature):
    head = HEADS[name]
    problem = make_problem(n=3, d=4, k=3, columns=head.columns(torch.empty(23, 1)))
    present = problem.ids >= 0

    def outputs(hidden, weight, bias):
        moved = Problem(hidden, weight, bias, problem.ids)
        result = moved.run(head, impl=impl, slice_width=width, temperature=temperature)
        return result.lse_rest, result.lse_rest_T, result.z[present]

    assert torch.autograd.gradcheck(outputs, problem.leaves)


@pytest.mark.parametrize("width", [1, 4, 23, None])
@pytest.mark.parametrize("k", [0, 1, 22, 23])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_reference_is_met_from_no_id_to_the_whole_vocabulary(width, k, temperature):
    problem = make_problem(k=k)
    grads = {}
    for impl in EXACT:
        result = problem.run(HeadOptions(), impl=impl, slice_width=width, temperature=temperature)
        grads[impl] = (*result, *torch.autograd.grad(mix(result), problem.leaves))
    for impl in EXACT:
        for found, reference in zip(grads[impl], grads["reference"], strict=True):
            torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)
        assert (grads[impl][0][1] == float("-inf")) == (k == 23)
        assert all(torch.isfinite(grad).all() for grad in grads[impl][3:])


def test_ids_at_slice_borders():
    problem = make_problem(n=2, v=12, k=6)
    problem.ids = torch.tensor([[0, 3, 4, 7, 8, 11], [11, -1, 4, 3, -1, 0]])
    results = [problem.run(HeadOptions(), impl="split", slice_width=width) for width in (4, 12)]
    grads = [torch.autograd.grad(mix(result), problem.leaves) for result in results]
    for left, right in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("impl", EXACT)
def test_no_rows(impl):
    problem = make_problem(n=2)
    problem.hidden, problem.ids = torch.empty(0, 7, dtype=torch.float64, requires_grad=True), problem.ids[:0]
    result = problem.run(HeadOptions(softcap=3.0), impl=impl)
    assert result.z.shape == (0, 4)
    assert result.lse_rest.shape == (0,)
    grads = torch.autograd.grad(mix(result), problem.leaves)
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_only_the_gradients_that_are_wanted(wanted):
    problem = make_problem()
    expected = dict(
        zip(
            ("hidden", "weight", "bias"),
            torch.autograd.grad(mix(problem.run(HeadOptions())), problem.leaves),
            strict=True,
        )
    )
    for name in ("hidden", "weight", "bias"):
        getattr(problem, name).requires_grad_(name == wanted)
    mix(problem.run(HeadOptions(), slice_width=5)).backward()
    for name in ("hidden", "weight", "bias"):
        grad = getattr(problem, name).grad
        assert (grad is not None) == (name == wanted)
    torch.testing.assert_close(getattr(problem, wanted).grad, expected[wanted])


@pytest.mark.parametrize("output", [0, 1, 2])
def test_one_output_alone(output):
    """Unused outputs arrive as None in backward; the gradient of the rest must not reach the ids, nor the other way."""
    problem = make_problem()
    problem.ids = problem.ids.masked_fill(problem.ids < 0, -1)
    grads = []
    for impl in EXACT:
        value = problem.run(HeadOptions(softcap=2.0), impl=impl, temperature=1.5)[output]
        loss = torch.where(torch.isfinite(value), value, 0.0).sum()
        grads.append(torch.autograd.grad(loss, problem.leaves))
    for reference, *others in zip(*grads, strict=True):
        for other in others:
            torch.testing.assert_close(reference, other)


def test_padded_rows_of_the_head_get_a_zero_gradient():
    problem = make_problem(columns=17)
    grads = torch.autograd.grad(mix(problem.run(HeadOptions(valid_vocab=17), slice_width=4)), problem.leaves)
    assert (grads[1][17:] == 0).all()
    assert (grads[2][17:] == 0).all()
    assert (grads[1][:17] != 0).any()


def test_tied_weights_get_both_gradients():
    torch.manual_seed(0)
    weight = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    ids, tokens = torch.tensor([[1, 4], [0, -1]]), torch.tensor([2, 9])
    grads = []
    for impl in EXACT:
        result = linear_gather(torch.tanh(weight[tokens]), weight, ids, impl=impl, slice_width=4)
        grads.append(torch.autograd.grad(mix(result), weight)[0])
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("width", [None, 1, 6])
def test_head_statistics(name, width):
    head = HEADS[name]
    problem = make_problem(columns=head.columns(torch.empty(23, 1)))
    head = HeadOptions(problem.bias, head.softcap, head.logit_scale, head.valid_vocab)
    logits = dense_logits(problem.hidden, problem.weight, head)
    found = head_statistics(problem.hidden, problem.weight, problem.ids, head=head, slice_width=width)
    torch.testing.assert_close(found.lse, logits.logsumexp(1))
    torch.testing.assert_close(found.max_logit, logits.amax(1))
    assert found.argmax.tolist() == logits.argmax(1).tolist()
    torch.testing.assert_close(found.z, problem.run(HEADS[name], impl="reference").z)
    assert not found.lse.requires_grad


@pytest.mark.parametrize("width", [None, 1, 5])
@pytest.mark.parametrize("name", HEADS)
def test_head_entropy(name, width):
    problem = make_problem(columns=17)
    head = replace(HEADS[name], bias=problem.bias)
    with torch.no_grad():
        problem.hidden[0] *= 50
        logp = dense_logits(problem.hidden, problem.weight, head).log_softmax(1)
    expected = -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(1)
    found = head_entropy(problem.hidden, problem.weight, head=head, slice_width=width)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_entropy_of_a_confident_row(dtype):
    """lse - E[z] would be 0 or negative: the entropy, 1e-8 nats, is far below the logits' rounding."""
    logits = torch.zeros(1, 40, dtype=dtype)
    logits[0, 3] = 25
    found = head_entropy(logits, torch.eye(40, dtype=dtype), slice_width=7)
    p = logits.double().softmax(1)
    torch.testing.assert_close(found.double(), torch.special.entr(p).sum(1), rtol=0.05, atol=0)
    assert 0 < found < 1e-7


def test_head_entropy_makes_no_tensor_of_the_size_of_the_logits():
    problem = make_problem(n=64, v=1000, d=8, k=0, dtype=torch.float32)
    with LargestTensor() as seen:
        head_entropy(problem.hidden, problem.weight, slice_width=100)
    assert seen.numel <= 64 * 101 + 1000 * 8


def test_head_statistics_takes_the_first_of_equals():
    found = head_statistics(torch.ones(1, 2), torch.ones(9, 2), torch.tensor([[3]]), slice_width=2)
    assert found.argmax.tolist() == [0]
