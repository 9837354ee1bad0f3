"""Sums with their gradient made in the forward pass: equal to the dense sum, with three products, handed out once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from logitcache.errors import ObjectiveError
from logitcache.kernels import HeadOptions, chunk, linear_gather, linear_gather_total
from tests.kernels.problems import HEADS, Problem, assert_compiles, bare_split, make_problem


def row_loss(start: int, stop: int, result: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Every row has a loss of its own, of every finite result."""
    number_n = torch.arange(start, stop, dtype=result[0].dtype) + 1
    lse_n, lse_T_n, z_nK = (torch.where(torch.isfinite(value), value, 0.0) for value in result)
    rows_n = number_n * (lse_n.sin() + 0.3 * lse_T_n.square() + (z_nK * (1 + z_nK.cos())).sum(1))
    return rows_n.sum(), {"rows": rows_n}


def total(problem: Problem, head: HeadOptions, **options: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    head = HeadOptions(problem.bias, head.softcap, head.logit_scale, head.valid_vocab)
    return linear_gather_total(problem.hidden, problem.weight, problem.ids, row_loss, head=head, **options)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9, None])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [0, 4, 17])
def test_sum_is_the_dense_sum(size, name, temperature, k):
    problem = make_problem(columns=17, k=k)
    head = HEADS[name]
    found, columns = total(problem, head, rows_per_chunk=size, temperature=temperature)
    result = problem.run(head, impl="reference", temperature=temperature)
    expected, dense = row_loss(0, 5, result)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(columns, dense)
    assert not columns["rows"].requires_grad
    for left, right in zip(
        torch.autograd.grad(3 * found, problem.leaves), torch.autograd.grad(3 * expected, problem.leaves), strict=True
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_only_the_gradients_that_are_wanted(wanted):
    problem = make_problem()
    expected = torch.autograd.grad(total(problem, HeadOptions())[0], getattr(problem, wanted))[0]
    for name in ("hidden", "weight", "bias"):
        getattr(problem, name).requires_grad_(name == wanted)
    total(problem, HeadOptions(), rows_per_chunk=2)[0].backward()
    for name in ("hidden", "weight", "bias"):
        assert (getattr(problem, name).grad is not None) == (name == wanted)
    torch.testing.assert_close(getattr(problem, wanted).grad, expected)


def products(problem: Problem, run: Callable[[], None]) -> float:
    """Matrix products that `run` makes, in units of one forward product."""
    # The counter knows addmm, but not its in-place form.
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    n, d = problem.hidden.shape
    return counter.get_total_flops() / (2 * n * d * problem.weight.shape[0])


@pytest.mark.parametrize(("frozen", "chunked", "split"), [((), 3, 4), (("weight",), 2, 3), (("hidden",), 2, 3)])
def test_one_product_fewer_than_split_and_another_one_with_a_frozen_head(frozen, chunked, split):
    problem = make_problem(n=64, v=100, d=32)
    for name in frozen:
        getattr(problem, name).requires_grad_(False)
    assert products(problem, lambda: total(problem, HeadOptions(), rows_per_chunk=16)[0].backward()) == chunked
    assert products(problem, lambda: bare_split(problem, HeadOptions(), slice_width=30)) == split


def test_gradients_are_handed_out_once():
    loss = total(make_problem(), HeadOptions())[0]
    loss.backward(retain_graph=True)
    with pytest.raises(ObjectiveError, match="use impl='split'"):
        loss.backward()


def test_a_second_derivative_is_refused():
    problem = make_problem()
    with pytest.raises(ObjectiveError, match="no second derivative"):
        torch.autograd.grad(total(problem, HeadOptions())[0], problem.hidden, create_graph=True)


def test_chunks_keep_near_their_budget():
    assert chunk.chunk_rows(10**6, 49152, 576) * 49152 * 4 <= chunk.CHUNK_BYTES_CPU
    assert chunk.chunk_rows(10**6, 49152, 576) > chunk.MIN_ROWS_CPU
    # A wide head: logits of a quarter of the weight's gradient.
    assert chunk.chunk_rows(10**6, 128_000, 4096) == 1024
    assert chunk.chunk_rows(10**6, 10**6, 64) == chunk.MIN_ROWS_CPU
    assert chunk.chunk_rows(10**6, 152_000, 4096, "cuda") == chunk.MIN_ROWS
    assert chunk.chunk_rows(7, 10**6, 64) == 7
    assert chunk.chunk_rows(0, 10, 64) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_survive_a_mean_over_many_rows(dtype):
    """Rounding before the division would overflow float16, dividing first would make it zeros."""
    problem = make_problem(n=512, v=64, d=8, dtype=dtype)

    def sum_of_rest(start, stop, result):
        return 300 * result.lse_rest.sum(), {}

    loss = linear_gather_total(problem.hidden, problem.weight, problem.ids, sum_of_rest, rows_per_chunk=100)[0]
    found = torch.autograd.grad(loss / 1e5, (problem.hidden, problem.weight))
    exact = linear_gather(problem.hidden.double(), problem.weight.double(), problem.ids, impl="reference")
    expected = torch.autograd.grad(300 * exact.lse_rest.sum() / 1e5, (problem.hidden, problem.weight))
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == dtype
        assert (left.double() - right.double()).norm() < 0.01 * right.double().norm()


def test_compiles_without_a_graph_break():
    problem = make_problem()

    def run(hidden, weight, bias, ids):
        return linear_gather_total(hidden, weight, ids, row_loss, head=HeadOptions(bias), rows_per_chunk=2)[0]

    assert_compiles(run, problem)
