"""The implementations as PyTorch operators: opcheck, torch.compile without a graph break, autocast, checkpointing."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from logitcache.kernels import HeadOptions, linear_gather
from logitcache.kernels.plan import GatherPlan
from tests.kernels.problems import EXACT, HEADS, assert_compiles, make_problem, mix

COMPILED = [impl for impl in EXACT if impl != "reference"]


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck_of_forward(name, temperature, dtype):
    problem = make_problem(columns=17, dtype=dtype)
    head = replace(HEADS[name], bias=problem.bias)
    plan = GatherPlan.of(problem.hidden, problem.weight, head, temperature, slice_width=5)
    torch.library.opcheck(torch.ops.logitcache.split_gather, (*problem.leaves, problem.ids, *astuple(plan)))


@pytest.mark.parametrize("wants", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck_of_backward(wants):
    problem = make_problem()
    tensors = [*(leaf.detach() for leaf in problem.leaves), problem.ids]
    plan = GatherPlan.of(problem.hidden, problem.weight, HeadOptions(), 2.0)
    results = torch.ops.logitcache.split_gather(*tensors, *astuple(plan))
    grads = [torch.randn_like(result) for result in results[:2]]
    torch.library.opcheck(
        torch.ops.logitcache.split_gather_backward, (*grads, None, *tensors, *results, *astuple(plan), *wants)
    )


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_compiles_without_a_graph_break(impl, name, temperature):
    problem = make_problem(columns=17)

    def run(hidden, weight, bias, ids):
        head = replace(HEADS[name], bias=bias)
        return mix_all(linear_gather(hidden, weight, ids, head=head, impl=impl, temperature=temperature))

    assert_compiles(run, problem)


def mix_all(result: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A scalar of every output that compiles: no random numbers."""
    return sum(torch.where(torch.isfinite(value), value, 0.0).sin().sum() for value in result)


@pytest.mark.parametrize("impl", COMPILED)
def test_checkpointing_gives_the_same_gradients(impl):
    problem = make_problem()
    plain = torch.autograd.grad(mix(problem.run(HeadOptions(), impl=impl)), problem.leaves)
    again = checkpoint(lambda: mix(problem.run(HeadOptions(), impl=impl)), use_reentrant=False)
    for found, expected in zip(torch.autograd.grad(again, problem.leaves), plain, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", COMPILED)
def test_autocast_on_cpu_changes_nothing(impl):
    """Half-precision products exist on CUDA only with float32 results; elsewhere operands are not rounded."""
    problem = make_problem(dtype=torch.float32)
    plain = problem.run(HeadOptions(), impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = problem.run(HeadOptions(), impl=impl)
    for found, expected in zip(cast, plain, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", COMPILED)
def test_a_second_derivative_is_refused(impl):
    problem = make_problem()
    grad = torch.autograd.grad(mix(problem.run(HeadOptions(), impl=impl)), problem.hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        grad.sum().backward()
