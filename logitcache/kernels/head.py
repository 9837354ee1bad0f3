"""The language-model head as the kernels see it: its options, the results they return, and input checks.

Legend: N rows (token positions), D width, V rows of the head, K gathered ids per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from logitcache.errors import ObjectiveError
from logitcache.kernels.shard import VocabularyShard

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class HeadOptions:
    """Everything between `hidden @ weight.T` and the logits: z = softcap(logit_scale * (hidden @ weight.T + bias)).

    Args:
        bias: [V], or None.
        softcap: c > 0 for z = c * tanh(z / c) (Gemma 2, arXiv:2408.00118, section 2), or None.
        logit_scale: factor on the logits before the softcap (Cohere's `logit_scale`, or 1 / Granite's
            `logits_scaling`), or None.
        valid_vocab: number of real tokens; columns from there on are padding of the head and take no part.
        shard: which rows of the head `weight` and `bias` hold when several processes share it, or None for all. ids
            and valid_vocab count over the whole head all the same.
    """

    bias: torch.Tensor | None = None
    softcap: float | None = None
    logit_scale: float | None = None
    valid_vocab: int | None = None
    shard: VocabularyShard | None = None

    @property
    def scale(self) -> float:
        """The factor on the logits, 1 when none was given."""
        return 1.0 if self.logit_scale is None else float(self.logit_scale)

    def rows(self, weight_VD: torch.Tensor) -> int:
        """Number of rows of the head, over all processes that share it."""
        return int(weight_VD.shape[0]) if self.shard is None else self.shard.total

    def columns(self, weight_VD: torch.Tensor) -> int:
        """Number of columns that take part in the softmax, over all processes that share the head."""
        return self.rows(weight_VD) if self.valid_vocab is None else int(self.valid_vocab)


class GatherResult(NamedTuple):
    """What the primitive returns; float64 for float64 inputs, float32 otherwise.

    lse_rest [N] is log(sum(exp(z))) over the columns that are *not* among the row's ids (-inf if there are none),
    lse_rest_T [N] the same of z / T (the same tensor when T == 1), z [N, K] the logits at the ids (-inf at padding).
    """

    lse_rest: torch.Tensor
    lse_rest_T: torch.Tensor
    z: torch.Tensor


class HeadStatistics(NamedTuple):
    """Full-softmax facts of each row, without a graph: lse [N], max_logit [N], argmax int64 [N], z [N, K]."""

    lse: torch.Tensor
    max_logit: torch.Tensor
    argmax: torch.Tensor
    z: torch.Tensor


class HeadEntropy(NamedTuple):
    """Of some of the vocabulary, without a graph: lse [N], and entropy [N] of the softmax over it, in nats."""

    lse: torch.Tensor
    entropy: torch.Tensor


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 as soon as one tensor is float64, float32 otherwise: logits are never kept in half precision."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_head(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, head: HeadOptions) -> None:
    """Raise ObjectiveError, naming the argument, if the head cannot be applied to the hidden states."""
    for name, value in (("hidden", hidden_ND), ("weight", weight_VD)):
        if not isinstance(value, torch.Tensor):
            raise ObjectiveError(f"{name} is a {type(value).__name__}, not a tensor; pass the tensor itself")
        if type(value).__name__ == "DTensor":
            raise ObjectiveError(
                f"{name} is a DTensor, which this loss does not take; pass {name}.full_tensor(), or of a weight "
                "split by rows the local ones with shard=VocabularyShard.of(...)"
            )
        if value.dtype not in FLOATS:
            raise ObjectiveError(f"{name} is {value.dtype}; use float64, float32, float16 or bfloat16")
        if value.ndim != 2:
            raise ObjectiveError(
                f"{name} has shape {tuple(value.shape)} but needs two dimensions; flatten batch and length "
                "into one with .flatten(0, 1)"
            )
    if hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ObjectiveError(f"hidden has width {hidden_ND.shape[1]}, but weight has width {weight_VD.shape[1]}")
    if hidden_ND.device != weight_VD.device:
        raise ObjectiveError(f"hidden is on {hidden_ND.device}, but weight is on {weight_VD.device}; move one of them")
    _check_options(weight_VD, head)


def _check_options(weight_VD: torch.Tensor, head: HeadOptions) -> None:
    rows, total = int(weight_VD.shape[0]), head.rows(weight_VD)
    if head.shard is not None:
        head.shard.check(rows)
    if total == 0:
        raise ObjectiveError("weight has no rows; a head needs at least one token")
    if head.bias is not None and (head.bias.shape != (rows,) or head.bias.device != weight_VD.device):
        raise ObjectiveError(
            f"bias has shape {tuple(head.bias.shape)} on {head.bias.device}; it needs shape ({rows},) on "
            f"{weight_VD.device}, like weight's rows"
        )
    if head.softcap is not None and not (math.isfinite(head.softcap) and head.softcap > 0):
        raise ObjectiveError(f"softcap is {head.softcap}; it must be a finite number above 0, or None for no cap")
    if head.logit_scale is not None and not (math.isfinite(head.logit_scale) and head.logit_scale != 0):
        raise ObjectiveError(f"logit_scale is {head.logit_scale}; it must be finite and not 0, or None for no scale")
    if head.valid_vocab is not None and not isinstance(head.valid_vocab, int):
        raise ObjectiveError(f"valid_vocab is {head.valid_vocab!r}; it must be a whole number, or None")
    if head.valid_vocab is not None and not 0 < head.valid_vocab <= total:
        raise ObjectiveError(
            f"valid_vocab is {head.valid_vocab}, but weight has {total} rows; it must lie in [1, {total}]"
        )


def check_ids(hidden_ND: torch.Tensor, ids_NK: torch.Tensor, columns: int) -> None:
    """Raise ObjectiveError if the ids do not fit. Values are read on CPU only: elsewhere it would stall the device."""
    if ids_NK.ndim != 2 or ids_NK.shape[0] != hidden_ND.shape[0]:
        raise ObjectiveError(
            f"ids has shape {tuple(ids_NK.shape)}; it needs [{hidden_ND.shape[0]}, K], as hidden's rows"
        )
    if ids_NK.dtype != torch.int64:
        raise ObjectiveError(f"ids is {ids_NK.dtype}; use int64")
    if ids_NK.device != hidden_ND.device:
        raise ObjectiveError(f"ids is on {ids_NK.device}, but hidden is on {hidden_ND.device}; move one of them")
    if torch.compiler.is_compiling() or ids_NK.device.type != "cpu" or ids_NK.numel() == 0:
        return
    if int(ids_NK.max()) >= columns:
        raise ObjectiveError(f"ids holds {int(ids_NK.max())}, but the head has only {columns} valid columns")
    ordered_NK = ids_NK.sort(dim=1).values
    twice = (ordered_NK[:, 1:] == ordered_NK[:, :-1]) & (ordered_NK[:, 1:] >= 0)
    if bool(twice.any()):
        row = int(twice.any(dim=1).nonzero()[0])
        raise ObjectiveError(f"ids repeats an id in row {row}; ids must be unique within a row")


def check_temperature(temperature: float) -> None:
    """Raise ObjectiveError unless the temperature is a finite number above 0."""
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not (number and math.isfinite(temperature) and temperature > 0):
        raise ObjectiveError(f"temperature is {temperature!r}; it must be a finite number above 0")
