"""What a launch of the primitive is told besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GatherPlan:
    """Options of `linear_gather` as an implementation sees them.

    `columns` is the valid vocabulary, `operand_dtype` the type of the operands of the matrix products and
    `slice_width` overrides the columns of a slice (None: by memory).
    """

    temperature: float
    softcap: float | None
    logit_scale: float
    columns: int
    operand_dtype: torch.dtype
    slice_width: int | None
