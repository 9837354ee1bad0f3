"""Dense reference of the primitive, for tests and for reading: the whole [N, V] of logits, and autograd.

Legend: N rows (token positions), D width, V rows of the head, K gathered ids per row.
"""

from __future__ import annotations

import torch

from logitcache.kernels.head import GatherResult, HeadOptions, accumulation_dtype


def dense_logits(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, head: HeadOptions) -> torch.Tensor:
    """All logits [N, valid_vocab] of the head, float64 for float64 inputs and float32 otherwise."""
    dtype = accumulation_dtype(hidden_ND, weight_VD)
    columns = head.columns(weight_VD)
    with torch.autocast(device_type=hidden_ND.device.type, enabled=False):
        logits_NV = hidden_ND.to(dtype) @ weight_VD[:columns].to(dtype).T
    if head.bias is not None:
        logits_NV = logits_NV + head.bias[:columns].to(dtype)
    if head.logit_scale is not None:
        logits_NV = logits_NV * head.scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    return logits_NV


def linear_gather(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor, temperature: float, head: HeadOptions
) -> GatherResult:
    """The primitive of `logitcache.kernels.linear_gather`, in the obvious way."""
    logits_NV = dense_logits(hidden_ND, weight_VD, head)
    columns = logits_NV.shape[1]
    # Padding ids point at one column past the end, which is cut off again.
    index_NK = torch.where(ids_NK < 0, columns, ids_NK)
    gathered_NV = torch.zeros(len(logits_NV), columns + 1, dtype=torch.bool, device=logits_NV.device)
    gathered_NV = gathered_NV.scatter(1, index_NK, True)[:, :columns]
    past_end_N1 = logits_NV.new_full((len(logits_NV), 1), float("-inf"))
    z_NK = torch.cat([logits_NV, past_end_N1], dim=1).gather(1, index_NK)
    lse_rest_N = _rest_logsumexp(logits_NV, gathered_NV)
    lse_rest_T_N = lse_rest_N if temperature == 1 else _rest_logsumexp(logits_NV / temperature, gathered_NV)
    return GatherResult(lse_rest_N, lse_rest_T_N, z_NK)


def _rest_logsumexp(logits_NV: torch.Tensor, gathered_NV: torch.Tensor) -> torch.Tensor:
    # A row of nothing but -inf has a NaN gradient, which masked_fill stops; -inf is its right value.
    return torch.logsumexp(logits_NV.masked_fill(gathered_NV, float("-inf")), dim=1)
