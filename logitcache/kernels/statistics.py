"""Facts of the full softmax without a graph and without [N, V] memory: what evaluation reads.

Legend: N rows (token positions), D width, V rows of the head, W columns of a slice, K gathered ids per row.
"""

from __future__ import annotations

import torch

from logitcache.kernels.head import HeadOptions, HeadStatistics, accumulation_dtype
from logitcache.kernels.slices import Slicer, product_dtype
from logitcache.kernels.split import RunningSum


@torch.no_grad()
def head_statistics(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor, head: HeadOptions, width: int | None
) -> HeadStatistics:
    """See `logitcache.kernels.head_statistics`."""
    dtype = accumulation_dtype(hidden_ND, weight_VD)
    operand_dtype = product_dtype(hidden_ND, weight_VD, dtype)
    with torch.autocast(device_type=hidden_ND.device.type, enabled=False):
        slicer = Slicer(hidden_ND, weight_VD, ids_NK, head, dtype, operand_dtype, width)
        z_NK = torch.full(ids_NK.shape, float("-inf"), dtype=dtype, device=ids_NK.device)
        best_N = torch.full((slicer.rows,), float("-inf"), dtype=dtype, device=ids_NK.device)
        argmax_N = torch.zeros_like(best_N, dtype=torch.int64)
        running = RunningSum(best_N, (1.0,))
        for part in slicer:
            tile_NW = slicer.fill(part)
            z_NK = part.gather(z_NK)
            top_N, place_N = tile_NW.max(dim=1)
            argmax_N = torch.where(top_N > best_N, place_N + part.start, argmax_N)
            best_N = torch.maximum(best_N, top_N)
            running.add_(tile_NW)
    return HeadStatistics(running.logsumexp()[0], best_N, argmax_N, z_NK)
