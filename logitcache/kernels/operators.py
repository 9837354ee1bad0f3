"""The implementations as `torch.library` operators, so that autograd, torch.compile and opcheck know them.

An operator takes tensors and plain values only: `GatherPlan` is spelled out in its schema. lse_rest_T is an empty
tensor where it would be lse_rest's twin (T == 1), and a gradient that nobody wants is an empty tensor too.

Legend: N rows (token positions), D width, V rows of the head, K gathered ids per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch

from logitcache.kernels import split, triton_gather
from logitcache.kernels.head import accumulation_dtype
from logitcache.kernels.plan import GatherPlan

_PLAN = (
    "float temperature, float? softcap, float logit_scale, SymInt columns, ScalarType operand_dtype, int? slice_width"
)
_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor ids"
_FORWARD = f"({_TENSORS}, {_PLAN}) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor? grad_rest, Tensor? grad_rest_T, Tensor? grad_z, {_TENSORS}, "
    f"Tensor lse, Tensor lse_T, Tensor z, {_PLAN}, "
    "bool wants_hidden, bool wants_weight, bool wants_bias) -> (Tensor, Tensor, Tensor)"
)


def _define(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Register one implementation's pair of functions; both have the signatures of those in `split`."""

    @torch.library.custom_op(f"logitcache::{name}_gather", mutates_args=(), schema=_FORWARD)
    def gather(hidden: Any, weight: Any, bias: Any, ids: Any, *plan: Any) -> tuple[torch.Tensor, ...]:
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            lse_N, lse_T_N, z_NK = forward(hidden, weight, bias, ids, GatherPlan(*plan))
        return lse_N, lse_N.new_empty(0) if lse_T_N is None else lse_T_N, z_NK

    @gather.register_fake
    def _(hidden: Any, weight: Any, bias: Any, ids: Any, temperature: float, *plan: Any) -> tuple[torch.Tensor, ...]:
        dtype = accumulation_dtype(hidden, weight)
        rows = hidden.shape[0]
        lse_N = hidden.new_empty(rows, dtype=dtype)
        return (
            lse_N,
            hidden.new_empty(0 if temperature == 1 else rows, dtype=dtype),
            ids.new_empty(ids.shape, dtype=dtype),
        )

    @torch.library.custom_op(f"logitcache::{name}_gather_backward", mutates_args=(), schema=_BACKWARD)
    def gather_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        grads, tensors, results = arguments[:3], arguments[3:7], arguments[7:10]
        plan, wants = GatherPlan(*arguments[10:16]), arguments[16:]
        lse_T_N = None if plan.temperature == 1 else results[1]
        with torch.autocast(device_type=tensors[0].device.type, enabled=False):
            found = backward(grads, *tensors, results[0], lse_T_N, results[2], plan, wants)
        return tuple(tensors[0].new_empty(0) if grad is None else grad for grad in found)

    @gather_backward.register_fake
    def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
        hidden, weight, bias = arguments[3:6]
        wanted = zip((hidden, weight, bias), arguments[16:], strict=True)
        return tuple(hidden.new_empty(0) if not wants else torch.empty_like(tensor) for tensor, wants in wanted)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], *output)
        ctx.plan = inputs[4:]

    def formula(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, ids, *results = ctx.saved_tensors
        wants = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
        found = gather_backward(*grads, hidden, weight, bias, ids, *results, *ctx.plan, *wants)
        wanted = (grad if want else None for grad, want in zip(found, wants, strict=True))
        return (*wanted, None, *(None for _ in ctx.plan))

    gather.register_autograd(formula, setup_context=setup)
    return gather


_GATHER = {
    "split": _define("split", split.forward, split.backward),
    # Imports triton when it first runs.
    "triton": _define("triton", triton_gather.forward, triton_gather.backward),
}


def gather(
    name: str,
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_NK: torch.Tensor,
    plan: GatherPlan,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Run one implementation, with a graph: lse_rest [N], lse_rest_T [N] (None at T == 1), z [N, K]."""
    lse_N, lse_T_N, z_NK = _GATHER[name](hidden_ND, weight_VD, bias_V, ids_NK, *astuple(plan))
    return lse_N, None if plan.temperature == 1 else lse_T_N, z_NK
