"""Matrix products of a backward pass, accumulated in float32 or wider whatever the operands' type."""

from __future__ import annotations

import torch

from logitcache.kernels.slices import matmul_into

# Bytes of the part of a large total that is added to at a time.
PART_BYTES = 64 << 20


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b in `dtype`. Half-precision operands stay as they are on CUDA and are widened elsewhere."""
    if a.dtype == dtype or not a.is_cuda:
        return a.to(dtype) @ b.to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total += a @ b in total's type, over parts of its rows, so that no second total is needed."""
    rows = max(1, PART_BYTES // max(1, total.shape[1] * total.element_size()))
    for start in range(0, total.shape[0], rows):
        # Not addmm: libraries add its terms to the large total one by one, which doubles the error of long sums.
        total[start : start + rows].add_(product(a[start : start + rows], b, total.dtype))
    return total


def accumulate_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total += a @ b, for a few large sums: in one pass over the total where the types allow it."""
    return total.addmm_(a, b) if a.dtype == total.dtype else add_product_(total, a, b)


def write_product_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> None:
    """out = a @ b, accumulated in `dtype` and rounded once to out's type."""
    if a.dtype == out.dtype == dtype or (a.is_cuda and out.dtype in (a.dtype, dtype)):
        matmul_into(a, b, out)
    else:
        out.copy_(product(a, b, dtype))
