"""Matrix products of a backward pass, accumulated in float32 whatever the operands' type."""

from __future__ import annotations

import torch

from logitcache.kernels.slices import matmul_into


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32. Half-precision operands stay as they are on CUDA and are widened elsewhere."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def add_product_(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b in float32; `total` None counts as zero."""
    # Not addmm: libraries add its terms to the large total one by one, which doubles the error of long sums.
    return product(a, b) if total is None else total.add_(product(a, b))


def write_product_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out = a @ b, accumulated in float32 and rounded once to out's type."""
    if a.dtype == out.dtype == torch.float32 or (a.is_cuda and out.dtype in (a.dtype, torch.float32)):
        matmul_into(a, b, out)
    else:
        out.copy_(product(a, b))
