"""What each rank of the tests of a vocabulary-parallel head runs; free of pytest, as processes import it.

Legend: N rows, D width, V rows of the head, K ids per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from logitcache.kernels import HeadOptions, VocabularyShard, head_entropy, head_statistics, linear_gather
from logitcache.losses import Objective, distillation_loss
from tests.kernels import problems as heads
from tests.kernels.problems import EXACT
from tests.losses import problems as losses

# Rows of each rank. The last one of "padding" holds nothing but padding of a head with 16 or 17 valid columns.
SPLITS = {"even": (10, 9), "uneven": (3, 16), "padding": (17, 2), "empty": (19, 0)}


def block(tensor: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
    """This rank's rows, as a leaf."""
    start = sum(rows[: dist.get_rank()])
    return tensor.detach()[start : start + rows[dist.get_rank()]].clone().requires_grad_()


def worst(ours: Any, theirs: Any) -> float:
    """The largest difference; infinities must be equal."""
    same = torch.isinf(theirs) & (ours == theirs)
    difference = torch.where(same, 0.0, (ours - theirs).abs())
    return float(difference.max()) if difference.numel() else 0.0


def grads_of(value: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, leaves, allow_unused=False))


def compare(run: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...], rows: tuple[int, ...]) -> float:
    """Value and gradients of run(hidden, weight, bias, shard) with a split head against the whole one."""
    hidden, weight, bias = leaves
    value = run(hidden, weight, bias, None)
    grad_hidden, *grads = grads_of(value, [hidden, weight, bias])
    mine = [hidden.detach().clone().requires_grad_(), block(weight, rows), block(bias, rows)]
    shard = VocabularyShard.of(len(mine[1]))
    split = run(*mine, shard)
    ours = grads_of(split, mine)
    expected = [grad_hidden, *(block(grad, rows) for grad in grads)]
    pairs = zip([split, *ours], [value, *expected], strict=True)
    return max(worst(one.detach(), other.detach()) for one, other in pairs)


def all_checks() -> dict[str, float]:
    """Name of the check -> largest difference from the unsplit head. Runs in every rank."""
    found = {}
    for split, rows in SPLITS.items():
        for impl in EXACT:
            for name, options in (("plain", {}), ("softcap", {"softcap": 2.0}), ("padded", {"valid_vocab": 16})):
                for temperature in (1.0, 2.0):
                    head = HeadOptions(**options)
                    found[f"gather {split} {impl} {name} {temperature}"] = gather(rows, impl, head, temperature)
            for objective, temperature in losses.OBJECTIVES:
                name = f"loss {split} {impl} {objective.tail} {temperature}"
                found[name] = loss(rows, impl, objective, temperature)
            found[f"loss {split} {impl} cross_entropy"] = loss(rows, impl, Objective.cross_entropy(), 1.0)
        found[f"statistics {split}"] = statistics(rows)
    return found


def gather(rows: tuple[int, ...], impl: str, head: HeadOptions, temperature: float) -> float:
    """The primitive; of an odd number of rows, with padding anywhere, an empty row and a full one."""
    columns = head.valid_vocab or losses.V
    problem = heads.make_problem(n=7, v=losses.V, k=6, columns=columns)
    border = sorted({place % columns for place in (rows[0] - 1, rows[0], columns - 1, 0)})
    problem.ids[1] = torch.tensor(border + [-1] * (6 - len(border)))
    everything = torch.arange(columns).repeat(2, 1)
    problem.ids = torch.cat([torch.nn.functional.pad(problem.ids, (0, columns - 6), value=-1), everything])
    problem.hidden = torch.cat([problem.hidden, problem.hidden[:2]]).detach().requires_grad_()

    def run(hidden: Any, weight: Any, bias: Any, shard: Any) -> torch.Tensor:
        options = replace(head, bias=bias, shard=shard)
        return heads.mix(linear_gather(hidden, weight, problem.ids, head=options, impl=impl, temperature=temperature))

    return compare(run, problem.leaves, rows)


def loss(rows: tuple[int, ...], impl: str, objective: Objective, temperature: float) -> float:
    problem = losses.Problem(objective, temperature, {"softcap": 3.0, "valid_vocab": 17, "logit_scale": 1.3})
    # Labels on both sides of the border, stored and not.
    problem.labels[2:6] = torch.tensor([rows[0] - 1, rows[0], 0, 16]) % 17

    def run(hidden: Any, weight: Any, bias: Any, shard: Any) -> torch.Tensor:
        return distillation_loss(
            hidden, weight, problem.labels, problem.targets, objective, 0.6, temperature, impl, bias=bias, shard=shard,
            **problem.head,
        )  # fmt: skip

    return compare(run, problem.leaves, rows)


def statistics(rows: tuple[int, ...]) -> float:
    """Argmax too, also where two ranks hold equal logits (of whole numbers, so that no rounding parts them)."""
    problem = heads.make_problem(n=6, v=losses.V, k=3)
    with torch.no_grad():
        for leaf in problem.leaves:
            leaf.round_()
        problem.weight[2] *= 4
        problem.weight[-3], problem.bias[-3] = problem.weight[2], problem.bias[2]
        problem.hidden[0] = problem.weight[2]
    whole = head_statistics(problem.hidden, problem.weight, problem.ids, head=HeadOptions(bias=problem.bias))
    options = HeadOptions(bias=block(problem.bias, rows), shard=VocabularyShard.of(rows[dist.get_rank()]))
    split = head_statistics(problem.hidden, block(problem.weight, rows), problem.ids, head=options)
    assert int(whole.argmax[0]) == 2
    entropy = head_entropy(problem.hidden, problem.weight, head=HeadOptions(bias=problem.bias))
    ours = [*split, head_entropy(problem.hidden, block(problem.weight, rows), head=options)]
    return max(worst(one.double(), other.double()) for one, other in zip(ours, [*whole, entropy], strict=True))


def half_precision() -> dict[str, float]:
    """bfloat16 hidden states and weights: relative error of the hidden gradient, against a whole head in float32."""
    problem = heads.make_problem(n=16, v=64, d=32, k=5, dtype=torch.bfloat16)

    def grad(hidden: Any, weight: Any, bias: Any, shard: Any) -> torch.Tensor:
        head = HeadOptions(bias=bias, shard=shard)
        value = heads.mix(linear_gather(hidden, weight, problem.ids, head=head))
        return grads_of(value, [hidden])[0].float()

    rows = (40, 24)
    exact = grad(*(leaf.detach().float().requires_grad_() for leaf in problem.leaves), None)
    mine = [problem.hidden, block(problem.weight, rows), block(problem.bias, rows)]
    split, whole = grad(*mine, VocabularyShard.of(rows[dist.get_rank()])), grad(*problem.leaves, None)
    return {name: float((g - exact).norm() / exact.norm()) for name, g in (("split", split), ("whole", whole))}


def work() -> dict[str, Any]:
    shard = VocabularyShard.of(SPLITS["uneven"][dist.get_rank()])
    return {"checks": all_checks(), "half": half_precision(), "shard": (shard.start, shard.total)}
