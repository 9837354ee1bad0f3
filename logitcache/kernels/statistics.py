"""Facts of the full softmax without a graph and without [N, V] memory: what evaluation and masks read.

Legend: N rows (token positions), D width, V rows of the head, W columns of a slice, K gathered ids per row.
"""

from __future__ import annotations

import torch

from logitcache.kernels.head import HeadEntropy, HeadOptions, HeadStatistics, accumulation_dtype
from logitcache.kernels.plan import GatherPlan
from logitcache.kernels.slices import Slicer, softmax_


@torch.no_grad()
def head_statistics(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor, head: HeadOptions, width: int | None
) -> HeadStatistics:
    """See `logitcache.kernels.head_statistics`."""
    dtype = accumulation_dtype(hidden_ND, weight_VD)
    plan = GatherPlan.of(hidden_ND, weight_VD, head, slice_width=width)
    with torch.autocast(device_type=hidden_ND.device.type, enabled=False):
        slicer = Slicer(hidden_ND, weight_VD, head.bias, ids_NK, plan)
        z_NK = torch.full(ids_NK.shape, float("-inf"), dtype=dtype, device=ids_NK.device)
        best_N = torch.full((slicer.rows,), float("-inf"), dtype=dtype, device=ids_NK.device)
        lse_N, argmax_N = best_N, torch.zeros_like(best_N, dtype=torch.int64)
        for part in slicer:
            tile_NW = slicer.fill(part)
            z_NK = part.gather(z_NK)
            top_N, place_N = tile_NW.max(dim=1)
            argmax_N = torch.where(top_N > best_N, place_N + part.start, argmax_N)
            best_N = torch.maximum(best_N, top_N)
            lse_N = torch.logaddexp(lse_N, softmax_(tile_NW))
    return HeadStatistics(lse_N, best_N, argmax_N, z_NK)


@torch.no_grad()
def head_entropy(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, head: HeadOptions, width: int | None) -> HeadEntropy:
    """See `logitcache.kernels.head_entropy`; with the logsumexp, by which slices and shards are put together."""
    plan = GatherPlan.of(hidden_ND, weight_VD, head, slice_width=width)
    ids_N0 = hidden_ND.new_empty((len(hidden_ND), 0), dtype=torch.int64)
    with torch.autocast(device_type=hidden_ND.device.type, enabled=False):
        slicer = Slicer(hidden_ND, weight_VD, head.bias, ids_N0, plan)
        dtype = accumulation_dtype(hidden_ND, weight_VD)
        lse_N = torch.full((slicer.rows,), float("-inf"), dtype=dtype, device=hidden_ND.device)
        entropy_N = torch.zeros_like(lse_N)
        for part in slicer:
            tile_NW = slicer.fill(part)
            part_lse_N = softmax_(tile_NW)
            part_entropy_N = torch.special.entr(tile_NW, out=tile_NW).sum(dim=1)
            total_N = torch.logaddexp(lse_N, part_lse_N)
            entropy_N = entropy_share(lse_N, entropy_N, total_N) + entropy_share(part_lse_N, part_entropy_N, total_N)
            lse_N = total_N
    return HeadEntropy(lse_N, entropy_N)


def entropy_share(lse_N: torch.Tensor, entropy_N: torch.Tensor, total_N: torch.Tensor) -> torch.Tensor:
    """What a part of the vocabulary adds to the entropy of all: w H - w log w, with w its probability.

    A sum of such shares has no term below 0, while lse - E[z] is a small difference of large numbers where the student
    is confident.
    """
    weight_N = (lse_N - total_N).exp()
    return weight_N * entropy_N + torch.special.entr(weight_N)
