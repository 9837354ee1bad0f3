"""What only `split` promises: memory, precision in each type, no use of uninitialised memory."""

from __future__ import annotations

import pytest
import torch

from logitcache.kernels import HeadOptions, linear_gather, slices
from tests.kernels.problems import LargestTensor, Problem, bare_split, make_problem, mix

SHAPE = {"n": 252, "v": 507, "d": 123, "k": 9}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [HeadOptions(), HeadOptions(softcap=4.0, logit_scale=0.5)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_no_tensor_of_the_size_of_the_logits(dtype, head, temperature):
    problem = make_problem(n=64, v=1000, d=8, k=5, dtype=dtype)
    with LargestTensor() as seen:
        bare_split(problem, head, slice_width=100, temperature=temperature)
    # Two tiles stacked at T != 1, and the weight itself, are the largest there may be.
    assert seen.numel <= 2 * 64 * 101
    with LargestTensor() as dense:
        problem.run(head, impl="reference")
    assert dense.numel >= 64 * 1000


def test_width_keeps_a_tile_near_its_budget():
    assert slices.slice_columns(2048, 10**6) * 2048 * 4 == slices.TILE_BYTES_CPU
    assert slices.slice_columns(2048, 10**6, "cuda") * 2048 * 4 == slices.TILE_BYTES
    assert slices.slice_columns(10**6, 10**6) == slices.MIN_COLUMNS
    assert slices.slice_columns(1, 500) == 500
    assert slices.slice_columns(0, 500) == 500
    assert slices.slice_columns(8, 500, override=7) == 7
    assert slices.slice_columns(8, 500, override=10**6) == 500


def gradients(problem: Problem, impl: str, head: HeadOptions, width: int | None = None) -> list[torch.Tensor]:
    result = problem.run(head, impl=impl, slice_width=width)
    return [*result, *torch.autograd.grad(mix(result), problem.leaves)]


def eager(problem: Problem, head: HeadOptions) -> list[torch.Tensor]:
    """What one writes in plain PyTorch in the problem's own type."""
    logits = problem.hidden @ problem.weight.T + problem.bias
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    columns = logits.shape[1]
    index = problem.ids.masked_fill(problem.ids < 0, columns)
    outside = torch.zeros(len(logits), columns + 1, dtype=torch.bool).scatter(1, index, True)[:, :columns]
    rest = logits.masked_fill(outside, float("-inf")).logsumexp(1)
    z = torch.cat([logits, torch.full_like(logits[:, :1], float("-inf"))], 1).gather(1, index)
    loss = mix(type(problem.run(head))(rest, rest, z))
    return [rest, rest, z, *torch.autograd.grad(loss, problem.leaves)]


def widened(problem: Problem) -> Problem:
    leaves = [leaf.detach().double().requires_grad_() for leaf in problem.leaves]
    return Problem(*leaves, problem.ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [HeadOptions(), HeadOptions(softcap=8.0)])
@pytest.mark.parametrize("width", [64, 507])
def test_no_less_exact_than_plain_pytorch_in_the_same_type(dtype, head, width):
    problem = make_problem(**SHAPE, dtype=dtype)
    problem.hidden = (problem.hidden.detach() * 0.3).requires_grad_()
    truth = gradients(widened(problem), "reference", head)
    ours, plain = gradients(problem, "split", head, width), eager(problem, head)
    for name, exact, mine, theirs in zip(
        ("lse", "lse_T", "z", "hidden", "weight", "bias"), truth, ours, plain, strict=True
    ):
        finite = torch.isfinite(exact)
        errors = [(value.double() - exact)[finite].norm() / exact[finite].norm() for value in (mine, theirs)]
        assert errors[0] <= 2 * errors[1], (name, errors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["reference", "split"])
def test_types_of_results_and_gradients(dtype, impl):
    problem = make_problem(dtype=dtype)
    result = problem.run(HeadOptions(), impl=impl, slice_width=6)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for value in result} == {wide}
    assert {grad.dtype for grad in torch.autograd.grad(mix(result), problem.leaves)} == {dtype}


@pytest.mark.parametrize("impl", ["reference", "split"])
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_types_as_under_autocast(impl, autocast):
    problem = make_problem(dtype=torch.float32)
    problem.hidden = problem.hidden.detach().bfloat16().requires_grad_()
    exact = Problem(problem.hidden.detach().double().requires_grad_(), *problem.leaves[1:], problem.ids)
    truth = gradients(exact, "reference", HeadOptions())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = problem.run(HeadOptions(), impl=impl, slice_width=6)
        loss = mix(result)
    # As in any training loop, backward runs outside the autocast region.
    found = [*result, *torch.autograd.grad(loss, problem.leaves)]
    assert [value.dtype for value in found[3:]] == [torch.bfloat16, torch.float32, torch.float32]
    for index, (mine, right) in enumerate(zip(found, truth, strict=True)):
        tolerance = 1e-2 if index == 3 else 1e-5
        torch.testing.assert_close(mine.double(), right.double(), rtol=tolerance, atol=tolerance)


def test_nothing_uninitialised_is_read(monkeypatch):
    problem = make_problem(n=6, v=31, k=5)
    heads = [HeadOptions(), HeadOptions(softcap=3.0, logit_scale=0.5, valid_vocab=29)]
    problem.ids = problem.ids.clamp(max=28)
    problem.ids = torch.stack([row if len(set(row.tolist())) == 5 else torch.arange(5) for row in problem.ids])
    before = [gradients(problem, "split", head, 7) for head in heads]
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            made = _original(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, poisoned)
    assert torch.isnan(torch.empty(3)).all()
    for head, expected in zip(heads, before, strict=True):
        for mine, right in zip(gradients(problem, "split", head, 7), expected, strict=True):
            assert torch.equal(mine, right)


def test_a_confident_row_keeps_the_mass_outside_its_ids():
    """1 - p would be 0 in float32; the logsumexp over the rest is exact to rounding."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[40.0], [-3.0], [2.0], [5.0]])
    result = linear_gather(hidden, weight, torch.tensor([[0]]), slice_width=2)
    torch.testing.assert_close(result.lse_rest, torch.tensor([[-3.0, 2.0, 5.0]]).logsumexp(1))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_logits_stay_finite(scale):
    problem = make_problem(dtype=torch.float32)
    for impl in ("reference", "split"):
        found = gradients(problem, impl, HeadOptions(logit_scale=scale), None)
        assert torch.isfinite(found[0]).all()
        assert all(torch.isfinite(grad).all() for grad in found[3:])
