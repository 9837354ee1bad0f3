"""Small heads with ids, for the kernel tests. Legend: N rows, D width, V rows of the head, K ids per row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from logitcache.kernels import IMPLEMENTATIONS, GatherResult, HeadOptions, linear_gather, split
from logitcache.kernels.plan import GatherPlan

# Triton's kernels have no float64; tests/kernels/test_triton.py holds them against these.
EXACT = tuple(impl for impl in IMPLEMENTATIONS if impl != "triton")
HEADS = {
    "plain": HeadOptions(),
    "softcap": HeadOptions(softcap=2.0),
    "scale": HeadOptions(logit_scale=0.37),
    "padded": HeadOptions(valid_vocab=17),
    "all": HeadOptions(softcap=3.0, logit_scale=1.7, valid_vocab=19),
}


@dataclass
class Problem:
    """Leaves of a graph (hidden, weight, bias) and ids."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    ids: torch.Tensor

    def run(self, head: HeadOptions, **options: object) -> GatherResult:
        return linear_gather(self.hidden, self.weight, self.ids, head=replace(head, bias=self.bias), **options)

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.hidden, self.weight, self.bias


def random_ids(rows: int, columns: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Unique ids with padding at random places; the first row is empty, the second full."""
    ids = torch.stack([torch.randperm(columns, generator=generator)[:k] for _ in range(rows)])
    ids[torch.rand(ids.shape, generator=generator) < 0.2] = -1
    ids[0] = -1
    ids[1] = torch.randperm(columns, generator=generator)[:k]
    return ids


def make_problem(
    n: int = 5, v: int = 23, d: int = 7, k: int = 4, columns: int | None = None, dtype=torch.float64, seed: int = 0
) -> Problem:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(v, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return Problem(hidden, weight, bias, random_ids(n, columns or v, k, g))


@torch.no_grad()
def bare_split(problem: Problem, head: HeadOptions, temperature: float = 1.0, slice_width: int | None = None) -> None:
    """Forward and backward of 'split' outside its operator, whose insides dispatch modes do not see."""
    head = replace(head, bias=problem.bias)
    plan = GatherPlan.of(problem.hidden, problem.weight, head, temperature, slice_width)
    tensors = (*problem.leaves, problem.ids)
    results = split.forward(*tensors, plan)
    grads = tuple(None if result is None else torch.ones_like(result) for result in results)
    wants = tuple(leaf.requires_grad for leaf in problem.leaves)
    split.backward(grads, *tensors, *results, plan, wants)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def assert_compiles(run: Callable[..., torch.Tensor], problem: Problem) -> None:
    """A scalar of (hidden, weight, bias, ids) compiles as one graph, to the same value and gradients."""
    torch.compiler.reset()
    eager = run(*problem.leaves, problem.ids)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*problem.leaves, problem.ids)
    torch.testing.assert_close(compiled, eager)
    found, expected = (torch.autograd.grad(value, problem.leaves) for value in (compiled, eager))
    torch.testing.assert_close(found, expected)


def mix(result: GatherResult, seed: int = 1) -> torch.Tensor:
    """A scalar with random weights of both signs on every finite output."""
    g = torch.Generator().manual_seed(seed)
    total = result.z.new_zeros(())
    for value in result:
        weights = torch.randn(value.shape, generator=g, dtype=torch.float64).to(value)
        total = total + (torch.where(torch.isfinite(value), value, 0.0) * weights).sum()
    return total
