"""The primitive over slices of the vocabulary: memory for one tile of logits, never for [N, V].

Forward keeps a running maximum and sum (online softmax, arXiv:1805.02867). Backward makes each tile of logits again,
turns it into the logits' gradient, overwrites the sparse part in float32 before any rounding, and writes each slice of
the weight's gradient once. Four matrix products instead of a dense head's three.

Legend: N rows (token positions), D width, V rows of the head, W columns of a slice, K gathered ids per row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from logitcache.kernels.head import GatherResult, HeadOptions, accumulation_dtype
from logitcache.kernels.slices import Slice, Slicer, matmul_into, product_dtype


class RunningSum:
    """log(sum(exp(z / T))) over tiles, for each T, from one running maximum."""

    def __init__(self, like_N: torch.Tensor, temperatures: tuple[float, ...]) -> None:
        self.temperatures = temperatures
        self.maximum_N = torch.full_like(like_N, float("-inf"))
        self.sums = [torch.zeros_like(like_N) for _ in temperatures]

    def add_(self, tile_NW: torch.Tensor) -> None:
        """Add a tile's columns. The tile is used up."""
        before_N = self.maximum_N
        self.maximum_N = torch.maximum(before_N, tile_NW.amax(dim=1))
        # Where nothing finite was seen yet, 0 stands in for the maximum: -inf - -inf would be NaN.
        shift_N = self.maximum_N.masked_fill(self.maximum_N == float("-inf"), 0.0)
        tile_NW.sub_(shift_N[:, None])
        for index, temperature in enumerate(self.temperatures):
            alone = len(self.temperatures) == 1 and temperature == 1
            powers_NW = tile_NW.exp_() if alone else (tile_NW / temperature).exp_()
            decay_N = ((before_N - shift_N) / temperature).exp_()
            self.sums[index] = self.sums[index] * decay_N + powers_NW.sum(dim=1)

    def logsumexp(self) -> list[torch.Tensor]:
        """One [N] per temperature; -inf where no column was added."""
        return [
            total_N.log() + self.maximum_N / temperature
            for total_N, temperature in zip(self.sums, self.temperatures, strict=True)
        ]


class _SplitGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        ids_NK: torch.Tensor,
        temperature: float,
        head: HeadOptions,
        width: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        dtype = accumulation_dtype(hidden_ND, weight_VD)
        operand_dtype = product_dtype(hidden_ND, weight_VD, dtype)
        with torch.autocast(device_type=hidden_ND.device.type, enabled=False):
            slicer = Slicer(hidden_ND, weight_VD, ids_NK, head, dtype, operand_dtype, width)
            z_NK = torch.full(ids_NK.shape, float("-inf"), dtype=dtype, device=ids_NK.device)
            like_N = torch.empty(slicer.rows, dtype=dtype, device=ids_NK.device)
            running = RunningSum(like_N, (1.0,) if temperature == 1 else (1.0, temperature))
            for part in slicer:
                tile_NW = slicer.fill(part)
                z_NK = part.gather(z_NK)
                part.overwrite_(float("-inf"))
                running.add_(tile_NW)
        lse = running.logsumexp()
        lse_T_N = None if temperature == 1 else lse[1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, ids_NK, lse[0], lse_T_N, z_NK)
        ctx.temperature, ctx.width, ctx.dtype, ctx.operand_dtype = temperature, width, dtype, operand_dtype
        # The bias travels through save_for_backward, not through the options, so that autograd sees it.
        ctx.head = replace(head, bias=None)
        return lse[0], lse_T_N, z_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(device_type=ctx.saved_tensors[0].device.type, enabled=False):
            return (*_backward(ctx, grads), None, None, None, None)


class _Term:
    """One logsumexp's share of the gradient: factor * exp(z / temperature - shift)."""

    def __init__(self, grad_N: torch.Tensor, lse_N: torch.Tensor, temperature: float) -> None:
        self.temperature = temperature
        # -inf where a row's ids cover the vocabulary. Its powers are not finite, and all of them are overwritten.
        self.shift_N1 = lse_N[:, None]
        self.factor_N1 = (grad_N / temperature)[:, None]


def _backward(ctx: Any, grads: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    hidden_ND, weight_VD, bias_V, ids_NK, lse_N, lse_T_N, z_NK = ctx.saved_tensors
    grad_rest_N, grad_rest_T_N, grad_z_NK = grads
    head = replace(ctx.head, bias=bias_V)
    wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    slicer = Slicer(hidden_ND, weight_VD, ids_NK, head, ctx.dtype, ctx.operand_dtype, ctx.width)
    grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=ctx.dtype) if wants_hidden else None
    grad_weight_VD = torch.empty_like(weight_VD) if wants_weight else None
    grad_bias_V = torch.empty_like(bias_V) if wants_bias else None
    for grad_V in (grad_weight_VD, grad_bias_V):
        if grad_V is not None:
            grad_V[slicer.columns :] = 0
    sparse_NK = torch.zeros_like(z_NK) if grad_z_NK is None else grad_z_NK * head.chain(z_NK)
    terms = [_Term(grad_rest_N, lse_N, 1.0)] if grad_rest_N is not None else []
    if grad_rest_T_N is not None:
        terms.append(_Term(grad_rest_T_N, lse_T_N, ctx.temperature))
    for part in slicer:
        tile_NW = _tile_gradient_(slicer, part, terms)
        part.overwrite_(sparse_NK)
        if grad_bias_V is not None:
            grad_bias_V[part.start : part.stop] = tile_NW.sum(dim=0)
        operand_NW = tile_NW.to(ctx.operand_dtype)
        if grad_hidden_ND is not None:
            _add_product_(grad_hidden_ND, operand_NW, part.weight_WD)
        if grad_weight_VD is not None:
            _write_product_(grad_weight_VD[part.start : part.stop], operand_NW.T, slicer.hidden_ND, ctx.dtype)
    if grad_hidden_ND is not None:
        grad_hidden_ND = grad_hidden_ND.to(hidden_ND.dtype)
    return grad_hidden_ND, grad_weight_VD, grad_bias_V


def _tile_gradient_(slicer: Slicer, part: Slice, terms: list[_Term]) -> torch.Tensor:
    """Make the tile the raw logits' gradient outside the ids: chain * sum of g / T * exp(z / T - lse_T)."""
    if not terms:
        return part.tile_NW.zero_()
    tile_NW = slicer.fill(part)
    chain = slicer.head.chain(tile_NW)
    if len(terms) == 1 and terms[0].temperature == 1:
        tile_NW.sub_(terms[0].shift_N1).exp_().mul_(terms[0].factor_N1)
    else:
        powers = [(tile_NW / term.temperature).sub_(term.shift_N1).exp_().mul_(term.factor_N1) for term in terms]
        torch.sum(torch.stack(powers), dim=0, out=tile_NW)
    return tile_NW.mul_(chain) if isinstance(chain, torch.Tensor) or chain != 1 else tile_NW


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))


def _write_product_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, accumulate: torch.dtype) -> None:
    """out = a @ b, accumulated in `accumulate` and rounded once to out's type."""
    if out.dtype in (a.dtype, accumulate):
        matmul_into(a, b, out)
    elif a.dtype == accumulate:
        out.copy_(a @ b)
    else:
        out.copy_(torch.mm(a, b, out_dtype=accumulate))


def linear_gather(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    ids_NK: torch.Tensor,
    temperature: float,
    head: HeadOptions,
    width: int | None = None,
) -> GatherResult:
    """The primitive of `logitcache.kernels.linear_gather`; `width` overrides the columns of a slice."""
    lse_rest_N, lse_rest_T_N, z_NK = _SplitGather.apply(
        hidden_ND, weight_VD, head.bias, ids_NK, temperature, head, width
    )
    return GatherResult(lse_rest_N, lse_rest_N if lse_rest_T_N is None else lse_rest_T_N, z_NK)
