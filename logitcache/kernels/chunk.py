"""A sum of row losses over chunks of rows, with its gradient made in the same pass: three matrix products, not four.

While the logits [n, V] of one chunk exist, the caller's loss of those rows is evaluated on the gathered logits, PyTorch
differentiates that small part, and the logits become their own gradient in place. That needs the final weight of every
row (mean, alpha, ...) beforehand, which is why this is a sum and not the bare primitive.

Legend: N rows (token positions), n rows of a chunk, D width, V rows of the head, K gathered ids per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from logitcache.errors import ObjectiveError
from logitcache.kernels import operators
from logitcache.kernels.head import GatherResult, HeadOptions, accumulation_dtype
from logitcache.kernels.plan import GatherPlan
from logitcache.kernels.products import accumulate_product_, write_product_
from logitcache.kernels.slices import Slicer, matmul_into, softmax_
from logitcache.kernels.split import powers_gradient_, softmax_terms, sparse_gradient

# Least bytes of one chunk of logits. On CPU products stop gaining well before; accelerators want many rows, because
# each chunk reads the whole weight and adds to its whole gradient.
CHUNK_BYTES_CPU = 48 << 20
CHUNK_BYTES = 1 << 30
MIN_ROWS_CPU = 64
MIN_ROWS = 2048

# Further columns [n] of rows, by name: always the same names.
Columns = dict[str, torch.Tensor]
# (first row, last row + 1, the primitive's results there) -> (their share of the sum, further columns to hand out)
RowLoss = Callable[[int, int, GatherResult], tuple[torch.Tensor, Columns]]


def chunk_rows(rows: int, columns: int, width: int, device_type: str = "cpu") -> int:
    """Rows n of one chunk, for a head of `columns` tokens and hidden states of `width`."""
    if device_type == "cpu":
        # Each chunk adds to the whole gradient of the weight; a quarter of its size in logits makes that worthwhile.
        budget, least = max(CHUNK_BYTES_CPU, columns * width), MIN_ROWS_CPU
    else:
        budget, least = CHUNK_BYTES, MIN_ROWS
    return max(1, min(rows, max(least, budget // (4 * columns))))


def _shape(hidden_ND: torch.Tensor, plan: GatherPlan) -> tuple[int, int, int]:
    return int(hidden_ND.shape[0]), plan.columns, int(hidden_ND.shape[1])


def ranges(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """The chunks [start, stop) of `rows` rows; one empty chunk when there are none."""
    for start in range(0, max(rows, 1), size):
        yield start, min(start + size, rows)


def linear_gather_total(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    row_loss: RowLoss,
    *,
    head: HeadOptions | None = None,
    temperature: float = 1.0,
    rows_per_chunk: int | None = None,
) -> tuple[torch.Tensor, Columns]:
    """Sum of `row_loss` over all rows, differentiable in hidden, weight and the head's bias.

    Args:
        hidden, weight, ids, head, temperature: as in `linear_gather`, checked by the caller.
        row_loss: called once for each chunk with its rows [start, stop) and the primitive's results for them. Returns
            the chunk's share of the sum, a scalar that is differentiable in those results, and further columns [n] by
            name, the same names for every chunk.
        rows_per_chunk: rows of one chunk; see `chunk_rows` for the default.

    Returns:
        The sum, and the further columns [N], without a graph.

    Raises:
        ObjectiveError: backward runs a second time; the gradients are handed out once, without a copy.
    """
    head = head or HeadOptions()
    plan = GatherPlan.of(hidden, weight, head, temperature)
    plan = replace(plan, slice_width=plan.columns)
    size = rows_per_chunk or chunk_rows(*_shape(hidden, plan), hidden.device.type)
    tensors = (hidden, weight, head.bias)
    wants = tuple(tensor is not None and tensor.requires_grad for tensor in tensors)
    bias = None if head.bias is None else head.bias.detach()
    with torch.no_grad(), torch.autocast(device_type=hidden.device.type, enabled=False):
        totals = _Totals(hidden.detach(), weight.detach(), bias, plan, wants, size)
        for start, stop in ranges(int(hidden.shape[0]), size):
            totals.add(start, stop, ids[start:stop], row_loss)
        columns = {name: torch.cat([part[name] for part in totals.columns]) for name in totals.columns[0]}
    return _WithGradients.apply(*tensors, totals.total, *totals.gradients), columns


def linear_gather(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor, head: HeadOptions, plan: GatherPlan
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The bare primitive over chunks of rows: four products, for losses whose weights are not known beforehand."""
    plan = replace(plan, slice_width=plan.columns)
    size = chunk_rows(*_shape(hidden_ND, plan), hidden_ND.device.type)
    parts = [
        operators.gather("split", hidden_ND[start:stop], weight_VD, head.bias, ids_NK[start:stop], plan)
        for start, stop in ranges(int(hidden_ND.shape[0]), size)
    ]
    lse, lse_T, z = zip(*parts, strict=True)
    return torch.cat(lse), None if plan.temperature == 1 else torch.cat(lse_T), torch.cat(z)


class _WithGradients(torch.autograd.Function):
    """A total that was computed without a graph, together with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        total: torch.Tensor,
        *gradients: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.gradients = gradients
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, hidden_ND.dtype if bias_V is None else bias_V.dtype)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph=True: the gradients have no graph, and a penalty on them would train nothing, unnoticed.
            raise ObjectiveError("impl='chunk' has no second derivative; use impl='reference' with create_graph=True")
        if ctx.gradients is None:
            raise ObjectiveError(
                "impl='chunk' hands its gradients out once; use impl='split' to run backward through one loss twice"
            )
        gradients = ctx.gradients
        if torch.compiler.is_compiling():
            scaled = [None if grad is None else grad * grad_total for grad in gradients]
        else:
            ctx.gradients = None
            scaled = [None if grad is None else grad.mul_(grad_total) for grad in gradients]
        # Rounded last: in float16 the gradient of an unscaled sum over many rows could overflow, that of a mean vanish.
        rounded = [None if grad is None else grad.to(dtype) for grad, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return *rounded, None, None, None, None


class _Totals:
    """The sum, its gradients and the further columns while chunks are added."""

    def __init__(
        self,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        plan: GatherPlan,
        wants: tuple[bool, ...],
        size: int,
    ) -> None:
        dtype = accumulation_dtype(hidden_ND, weight_VD)
        self.hidden_ND, self.weight_VD, self.bias_V, self.plan = hidden_ND, weight_VD, bias_V, plan
        # Converted once, not once for each chunk.
        self.operand_VD = weight_VD[: plan.columns].to(plan.operand_dtype)
        self.buffer = torch.empty(size * plan.columns + 1, dtype=dtype, device=hidden_ND.device)
        self.grad_hidden_ND = torch.empty_like(hidden_ND, dtype=dtype) if wants[0] else None
        self.grad_weight_VD = torch.empty_like(weight_VD, dtype=dtype) if wants[1] else None
        if self.grad_weight_VD is not None:
            self.grad_weight_VD[plan.columns :] = 0
        self.grad_bias_V = torch.zeros_like(bias_V, dtype=dtype) if wants[2] and bias_V is not None else None
        self.total: torch.Tensor | None = None
        self.columns: list[Columns] = []

    def add(self, start: int, stop: int, ids_nK: torch.Tensor, row_loss: RowLoss) -> None:
        """Add the rows [start, stop)."""
        slicer = Slicer(self.hidden_ND[start:stop], self.operand_VD, self.bias_V, ids_nK, self.plan, self.buffer)
        (part,) = slicer
        tile_nV = slicer.fill(part)
        z_nK = part.gather(torch.full(ids_nK.shape, float("-inf"), dtype=tile_nV.dtype, device=tile_nV.device))
        part.overwrite_(float("-inf"))
        lse_n, lse_T_n = self._logsumexps(tile_nV)
        total, columns, grads = _differentiate(row_loss, start, stop, lse_n, lse_T_n, z_nK)
        self.total = total if self.total is None else self.total + total
        self.columns.append(columns)
        if self._softmax_is_kept:
            tile_nV.mul_((grads[0] * self.plan.logit_scale)[:, None])
        else:
            powers_gradient_(tile_nV, softmax_terms(grads, lse_n, lse_T_n, self.plan), self.plan)
        part.overwrite_(sparse_gradient(grads[2], z_nK, self.plan))
        self._add_products(start, stop, slicer.hidden_ND, tile_nV)

    @property
    def _softmax_is_kept(self) -> bool:
        """Whether the tile may become its softmax at once: the gradient then is a multiple of it."""
        return self.plan.temperature == 1 and self.plan.softcap is None

    def _logsumexps(self, tile_nV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._softmax_is_kept:
            return softmax_(tile_nV), None
        lse_T_n = None if self.plan.temperature == 1 else softmax_(tile_nV / self.plan.temperature)
        return softmax_(tile_nV.clone()), lse_T_n

    def _add_products(self, start: int, stop: int, hidden_nD: torch.Tensor, tile_nV: torch.Tensor) -> None:
        if self.grad_bias_V is not None:
            self.grad_bias_V[: self.plan.columns] += tile_nV.sum(dim=0)
        operand_nV = tile_nV.to(self.plan.operand_dtype)
        if self.grad_hidden_ND is not None:
            matmul_into(operand_nV, self.operand_VD, self.grad_hidden_ND[start:stop])
        if self.grad_weight_VD is None:
            return
        grad_VD = self.grad_weight_VD[: self.plan.columns]
        if start == 0:
            write_product_(grad_VD, operand_nV.T, hidden_nD, grad_VD.dtype)
        else:
            accumulate_product_(grad_VD, operand_nV.T, hidden_nD)

    @property
    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """Of hidden, weight and bias, in the type they were accumulated in."""
        return self.grad_hidden_ND, self.grad_weight_VD, self.grad_bias_V


def _differentiate(
    row_loss: RowLoss,
    start: int,
    stop: int,
    lse_n: torch.Tensor,
    lse_T_n: torch.Tensor | None,
    z_nK: torch.Tensor,
) -> tuple[torch.Tensor, Columns, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """The chunk's share of the sum, its further columns, and the gradients of lse_rest, lse_rest_T and z."""
    leaves = (lse_n, z_nK) if lse_T_n is None else (lse_n, z_nK, lse_T_n)

    def share(*leaves: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, Columns]]:
        total, columns = row_loss(
            start, stop, GatherResult(leaves[0], leaves[-1 if lse_T_n is not None else 0], leaves[1])
        )
        return total, (total, columns)

    grads, (total, columns) = torch.func.grad(share, argnums=tuple(range(len(leaves))), has_aux=True)(*leaves)
    return total, columns, (grads[0], grads[2] if lse_T_n is not None else None, grads[1])
