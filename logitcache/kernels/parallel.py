"""The primitive over a head whose vocabulary is split over processes (tensor parallelism, arXiv:1909.08053, section 3).

Each rank holds a block of rows of the weight; hidden states and ids are the same on all. Every rank runs any local
implementation on its own block, and what is left to communicate is small: [N] logsumexps, [N, K] gathered logits and,
backward, the [N, D] gradient of the hidden states.

Conventions, which are Megatron's: the caller computes the same loss on every rank from what comes out here, so the
gradients that come back are the same on all of them too and are not summed. Each rank's backward then leaves the whole
gradient of the hidden states and the gradient of its own rows. Collectives run in one order on all ranks.

Legend: N rows (token positions), D width, V rows of this rank's block, K gathered ids per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from logitcache.kernels.head import GatherResult, HeadEntropy, HeadOptions, HeadStatistics, accumulation_dtype
from logitcache.kernels.shard import VocabularyShard
from logitcache.kernels.statistics import entropy_share

LocalGather = Callable[[torch.Tensor, torch.Tensor, HeadOptions], GatherResult]
LocalStatistics = Callable[[torch.Tensor, HeadOptions], HeadStatistics]
LocalEntropy = Callable[[HeadOptions], HeadEntropy]


def linear_gather(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    ids_NK: torch.Tensor,
    temperature: float,
    head: HeadOptions,
    local: LocalGather,
) -> GatherResult:
    """The primitive of `logitcache.kernels.linear_gather` over `head.shard`.

    Args:
        hidden_ND, ids_NK: the same on every rank; ids count over the whole vocabulary.
        weight_VD: this rank's rows.
        local: runs the primitive on this block: local(hidden, ids within the block, options without a shard).
    """
    shard = _shard(head)
    columns = local_columns(weight_VD, head)
    ids_NK = local_ids(ids_NK, shard, columns)
    hidden_ND = _SumGradient.apply(hidden_ND, shard.group)
    if columns:
        result = local(hidden_ND, ids_NK, replace(head, shard=None, valid_vocab=columns))
    else:
        result = _nothing(hidden_ND, weight_VD, ids_NK, temperature, head)
    rest_N = _LogSumExp.apply(result.lse_rest, shard.group)
    # Asked of the temperature, not of the result, so that all ranks take the same steps.
    rest_T_N = rest_N if temperature == 1 else _LogSumExp.apply(result.lse_rest_T, shard.group)
    return GatherResult(rest_N, rest_T_N, _Collect.apply(result.z, ids_NK >= 0, shard.group))


def head_statistics(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor, head: HeadOptions, local: LocalStatistics
) -> HeadStatistics:
    """`logitcache.kernels.head_statistics` over `head.shard`, the same on every rank; arguments as above."""
    shard = _shard(head)
    columns = local_columns(weight_VD, head)
    ids_NK = local_ids(ids_NK, shard, columns)
    if columns:
        lse_N, best_N, argmax_N, z_NK = local(ids_NK, replace(head, shard=None, valid_vocab=columns))
    else:
        z_NK = _minus_infinity(hidden_ND, weight_VD, ids_NK.shape)
        lse_N = best_N = z_NK.new_full(ids_NK.shape[:1], float("-inf"))
        argmax_N = ids_NK.new_zeros(len(ids_NK))
    top_N = _reduce(best_N, dist.ReduceOp.MAX, shard.group)
    # The first of equals over the whole vocabulary: ranks without the maximum name an id past its end.
    candidate_N = torch.where((best_N == top_N) & (best_N > float("-inf")), argmax_N + shard.start, shard.total)
    return HeadStatistics(
        _log_sum_exp(lse_N, shard.group),
        top_N,
        _reduce(candidate_N, dist.ReduceOp.MIN, shard.group),
        _reduce(z_NK, dist.ReduceOp.MAX, shard.group),
    )


def head_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, head: HeadOptions, local: LocalEntropy
) -> torch.Tensor:
    """`logitcache.kernels.head_entropy` over `head.shard`, the same on every rank; arguments as above."""
    shard = _shard(head)
    columns = local_columns(weight_VD, head)
    if columns:
        lse_N, entropy_N = local(replace(head, shard=None, valid_vocab=columns))
    else:
        lse_N = _minus_infinity(hidden_ND, weight_VD, hidden_ND.shape[:1])
        entropy_N = torch.zeros_like(lse_N)
    share_N = entropy_share(lse_N, entropy_N, _log_sum_exp(lse_N, shard.group))
    return _reduce(share_N, dist.ReduceOp.SUM, shard.group)


def local_columns(weight_VD: torch.Tensor, head: HeadOptions) -> int:
    """How many of this rank's columns take part in the softmax: 0 where the block is padding of the head."""
    return min(max(head.columns(weight_VD) - _shard(head).start, 0), int(weight_VD.shape[0]))


def local_ids(ids_NK: torch.Tensor, shard: VocabularyShard, columns: int) -> torch.Tensor:
    """The ids counted from this rank's first row, -1 where they are padding or another rank's."""
    ids_NK = ids_NK - shard.start
    return ids_NK.masked_fill((ids_NK < 0) | (ids_NK >= columns), -1)


def _shard(head: HeadOptions) -> VocabularyShard:
    assert head.shard is not None
    return head.shard


def _minus_infinity(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return hidden_ND.new_full(shape, float("-inf"), dtype=accumulation_dtype(hidden_ND, weight_VD))


def _nothing(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor, temperature: float, head: HeadOptions
) -> GatherResult:
    """What a block without a valid column gives. It keeps a graph: its backward must take part in the others' sum."""
    z_NK = _minus_infinity(hidden_ND, weight_VD, ids_NK.shape)
    everywhere = torch.ones((), dtype=torch.bool, device=hidden_ND.device)
    rest_N = hidden_ND.sum(dim=1, dtype=z_NK.dtype).masked_fill(everywhere, float("-inf"))
    for unused in (weight_VD, head.bias):
        if unused is not None:
            rest_N = rest_N + unused[:0].sum(dtype=z_NK.dtype)
    return GatherResult(rest_N, rest_N if temperature == 1 else rest_N.clone(), z_NK)


def _reduce(tensor: torch.Tensor, operation: Any, group: Any) -> torch.Tensor:
    """The all-reduced copy of a tensor; nothing is sent for an empty one."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    if total.numel():
        dist.all_reduce(total, op=operation, group=group)
    return total


def _log_sum_exp(local_N: torch.Tensor, group: Any) -> torch.Tensor:
    maximum_N = _reduce(local_N, dist.ReduceOp.MAX, group)
    # Where no rank has a column, 0 stands in for the maximum: -inf - -inf would be NaN.
    shift_N = maximum_N.masked_fill(maximum_N == float("-inf"), 0.0)
    return _reduce((local_N.detach() - shift_N).exp(), dist.ReduceOp.SUM, group).log() + shift_N


class _LogSumExp(torch.autograd.Function):
    """log of the ranks' summed exp; the gradient of a rank's own share is g * exp(local - total)."""

    @staticmethod
    def forward(ctx: Any, local_N: torch.Tensor, group: Any) -> torch.Tensor:
        total_N = _log_sum_exp(local_N, group)
        ctx.save_for_backward(local_N, total_N)
        return total_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        local_N, total_N = ctx.saved_tensors
        share_N = torch.where(total_N == float("-inf"), 0.0, (local_N - total_N).exp())
        return grad_N * share_N, None


class _Collect(torch.autograd.Function):
    """Each logit from the rank that has it; the gradient goes back there."""

    @staticmethod
    def forward(ctx: Any, z_NK: torch.Tensor, here_NK: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.save_for_backward(here_NK)
        return _reduce(z_NK, dist.ReduceOp.MAX, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (here_NK,) = ctx.saved_tensors
        return torch.where(here_NK, grad_NK, 0.0), None, None


class _SumGradient(torch.autograd.Function):
    """The hidden states as they are; their gradient summed over the ranks, of which each knows its columns' part."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return hidden_ND.view_as(hidden_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _reduce(grad_ND, dist.ReduceOp.SUM, ctx.group), None
