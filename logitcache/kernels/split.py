"""The primitive over slices of the vocabulary: memory for one tile of logits, never for [N, V].

Forward adds the logsumexps of the slices (arXiv:1805.02867). Backward makes each tile of logits again, turns it into
the logits' gradient, overwrites the sparse part in float32 before any rounding, and writes each slice of the weight's
gradient once. Four matrix products instead of a dense head's three.

Legend: N rows (token positions), D width, V rows of the head, W columns of a slice, K gathered ids per row.
"""

from __future__ import annotations

import torch

from logitcache.kernels.head import accumulation_dtype
from logitcache.kernels.plan import GatherPlan, Gradients
from logitcache.kernels.products import add_product_, write_product_
from logitcache.kernels.slices import Slice, Slicer, softmax_


def forward(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_NK: torch.Tensor,
    plan: GatherPlan,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """lse_rest [N], lse_rest_T [N] (None at T == 1) and z [N, K] of `logitcache.kernels.linear_gather`."""
    dtype = accumulation_dtype(hidden_ND, weight_VD)
    slicer = Slicer(hidden_ND, weight_VD, bias_V, ids_NK, plan)
    z_NK = torch.full(ids_NK.shape, float("-inf"), dtype=dtype, device=ids_NK.device)
    lse_N = torch.full((slicer.rows,), float("-inf"), dtype=dtype, device=ids_NK.device)
    lse_T_N = None if plan.temperature == 1 else lse_N
    for part in slicer:
        tile_NW = slicer.fill(part)
        z_NK = part.gather(z_NK)
        part.overwrite_(float("-inf"))
        if lse_T_N is not None:
            lse_T_N = torch.logaddexp(lse_T_N, softmax_(tile_NW / plan.temperature))
        lse_N = torch.logaddexp(lse_N, softmax_(tile_NW))
    return lse_N, lse_T_N, z_NK


def backward(
    grads: Gradients,
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_NK: torch.Tensor,
    lse_N: torch.Tensor,
    lse_T_N: torch.Tensor | None,
    z_NK: torch.Tensor,
    plan: GatherPlan,
    wants: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of hidden, weight and bias, each None where `wants` says no, from those of forward's results.

    Args:
        grads: of lse_rest [N], lse_rest_T [N] and z [N, K]; None for zeros.
        hidden_ND, weight_VD, bias_V, ids_NK, plan: forward's arguments.
        lse_N, lse_T_N, z_NK: forward's results.
        wants: whether the gradients of hidden, weight and bias are needed.
    """
    slicer = Slicer(hidden_ND, weight_VD, bias_V, ids_NK, plan)
    totals = GradientTotals(slicer, hidden_ND, weight_VD, bias_V, wants)
    sparse_NK = sparse_gradient(grads[2], z_NK, plan)
    terms = softmax_terms(grads, lse_N, lse_T_N, plan)
    for part in slicer:
        tile_NW = tile_gradient_(slicer, part, terms)
        part.overwrite_(sparse_NK)
        totals.add(part, tile_NW)
    return totals.finished()


class SoftmaxTerm:
    """One logsumexp's share of the gradient: factor * exp(z / temperature - shift)."""

    def __init__(self, grad_N: torch.Tensor, lse_N: torch.Tensor, temperature: float) -> None:
        self.temperature = temperature
        # -inf where a row's ids cover the vocabulary. Its powers are not finite, and all of them are overwritten.
        self.shift_N1 = lse_N[:, None]
        self.factor_N1 = (grad_N / temperature)[:, None]


def softmax_terms(
    grads: Gradients, lse_N: torch.Tensor, lse_T_N: torch.Tensor | None, plan: GatherPlan
) -> list[SoftmaxTerm]:
    """The terms whose gradient is not None."""
    terms = [] if grads[0] is None else [SoftmaxTerm(grads[0], lse_N, 1.0)]
    if grads[1] is not None and lse_T_N is not None:
        terms.append(SoftmaxTerm(grads[1], lse_T_N, plan.temperature))
    return terms


def sparse_gradient(grad_z_NK: torch.Tensor | None, z_NK: torch.Tensor, plan: GatherPlan) -> torch.Tensor:
    """The raw logits' gradient at the ids, [N, K]."""
    if grad_z_NK is None:
        return torch.zeros_like(z_NK)
    return grad_z_NK * plan.chain(z_NK)


def tile_gradient_(slicer: Slicer, part: Slice, terms: list[SoftmaxTerm]) -> torch.Tensor:
    """Make the slice's tile, whatever it holds, the raw logits' gradient outside the ids."""
    if not terms:
        return part.tile_NW.zero_()
    return powers_gradient_(slicer.fill(part), terms, slicer.plan)


def powers_gradient_(tile_NW: torch.Tensor, terms: list[SoftmaxTerm], plan: GatherPlan) -> torch.Tensor:
    """Turn a tile of logits into chain * sum of g / T * exp(z / T - lse_T)."""
    chain = plan.chain(tile_NW)
    if len(terms) == 1 and terms[0].temperature == 1:
        tile_NW.sub_(terms[0].shift_N1).exp_().mul_(terms[0].factor_N1)
    else:
        powers = [(tile_NW / term.temperature).sub_(term.shift_N1).exp_().mul_(term.factor_N1) for term in terms]
        torch.sum(torch.stack(powers), dim=0, out=tile_NW)
    return tile_NW.mul_(chain) if isinstance(chain, torch.Tensor) or chain != 1 else tile_NW


class GradientTotals:
    """The gradients of hidden, weight and bias while slices of the logits' gradient come in."""

    def __init__(
        self,
        slicer: Slicer,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        wants: tuple[bool, bool, bool],
    ) -> None:
        self.slicer, self.hidden_dtype = slicer, hidden_ND.dtype
        self.accumulate = slicer.buffer.dtype
        self.hidden_ND = torch.zeros_like(hidden_ND, dtype=self.accumulate) if wants[0] else None
        self.weight_VD = torch.empty_like(weight_VD) if wants[1] else None
        self.bias_V = torch.empty_like(bias_V) if wants[2] and bias_V is not None else None
        for grad_V in (self.weight_VD, self.bias_V):
            if grad_V is not None:
                grad_V[slicer.plan.columns :] = 0

    def add(self, part: Slice, tile_NW: torch.Tensor) -> None:
        """Take in one slice of the raw logits' gradient."""
        if self.bias_V is not None:
            self.bias_V[part.start : part.stop] = tile_NW.sum(dim=0)
        operand_NW = tile_NW.to(self.slicer.plan.operand_dtype)
        if self.hidden_ND is not None:
            add_product_(self.hidden_ND, operand_NW, part.weight_WD)
        if self.weight_VD is not None:
            out_WD = self.weight_VD[part.start : part.stop]
            write_product_(out_WD, operand_NW.T, self.slicer.hidden_ND, self.accumulate)

    def finished(self) -> Gradients:
        """The gradients, in the types of their tensors."""
        hidden_ND = None if self.hidden_ND is None else self.hidden_ND.to(self.hidden_dtype)
        return hidden_ND, self.weight_VD, self.bias_V
