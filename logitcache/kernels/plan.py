"""What an implementation of the primitive needs besides its tensors: plain values, as operators can take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from logitcache.kernels.head import HeadOptions, accumulation_dtype

# Of hidden, weight and bias, or of lse_rest, lse_rest_T and z: None where there is none, or nobody wants it.
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class GatherPlan:
    """One call of the primitive without its tensors.

    Args:
        temperature: T > 0 of the second logsumexp.
        softcap: c of c * tanh(z / c), or None.
        logit_scale: factor on the logits before the softcap, 1 for none.
        columns: number of real tokens; rows of the weight from there on take no part.
        operand_dtype: type of the operands of the matrix products; their results are never narrower than float32.
        slice_width: columns of one slice; None lets the implementation choose.
    """

    temperature: float
    softcap: float | None
    logit_scale: float
    columns: int
    operand_dtype: torch.dtype
    slice_width: int | None = None

    @classmethod
    def of(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        head: HeadOptions,
        temperature: float = 1.0,
        slice_width: int | None = None,
    ) -> GatherPlan:
        """The plan for these tensors, with autocast as it is now."""
        operands = product_dtype(hidden, weight, accumulation_dtype(hidden, weight))
        return cls(float(temperature), head.softcap, head.scale, head.columns(weight), operands, slice_width)

    def cap_(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply scale and softcap to raw logits in place."""
        if self.softcap is not None:
            return logits.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap)
        return logits if self.logit_scale == 1 else logits.mul_(self.logit_scale)

    def chain(self, logits: torch.Tensor) -> torch.Tensor | float:
        """d(logits) / d(raw logits), from the finished logits: scale * (1 - (z / c)^2)."""
        if self.softcap is None:
            return self.logit_scale
        return logits.square().mul_(-self.logit_scale / self.softcap**2).add_(self.logit_scale)


def product_dtype(hidden: torch.Tensor, weight: torch.Tensor, accumulate: torch.dtype) -> torch.dtype:
    """Type of the operands of the matrix products.

    CUDA multiplies half-precision operands into float32 results (`torch.mm(..., out_dtype=)`, PyTorch 2.8 and later);
    everywhere else the operands are widened, so that logits are never rounded to half precision.
    """
    halves = (torch.float16, torch.bfloat16)
    if hidden.device.type != "cuda" or accumulate != torch.float32 or "dtype" not in torch.ops.aten.mm.overloads():
        return accumulate
    if torch.is_autocast_enabled("cuda"):
        autocast = torch.get_autocast_dtype("cuda")
        return autocast if autocast in halves else accumulate
    found = {tensor.dtype for tensor in (hidden, weight) if tensor.dtype in halves}
    return found.pop() if len(found) == 1 else accumulate
