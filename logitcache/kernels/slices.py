"""Slices of the vocabulary: how wide they are, and the tile of logits [N, W] each of them makes.

Legend: N rows (token positions), D width, V rows of the head, W columns of a slice, K gathered ids per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from logitcache.kernels.head import accumulation_dtype
from logitcache.kernels.plan import GatherPlan

# Bytes of one tile of logits. On CPU it should stay in the last-level cache (8 to 32 MB measured alike, 64 MB 10 to
# 25 % slower); on accelerators fewer, larger products hide the launches.
TILE_BYTES_CPU = 16 << 20
TILE_BYTES = 64 << 20
# Narrower slices starve the matrix product, whatever memory they save.
MIN_COLUMNS = 1024


def slice_columns(rows: int, columns: int, device_type: str = "cpu", override: int | None = None) -> int:
    """Width W of the slices for `rows` positions and `columns` tokens; `override` is only kept within [1, columns]."""
    budget = TILE_BYTES_CPU if device_type == "cpu" else TILE_BYTES
    width = max(budget // (4 * max(rows, 1)), MIN_COLUMNS) if override is None else override
    return max(1, min(width, columns))


def matmul_into(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = a @ b, accumulated in float32 or wider whatever the operands' type."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


@dataclass(frozen=True)
class Slice:
    """One slice: columns [start, stop), its tile and the flat places of the row's ids in the tile.

    `flat` is the tile's memory with one element more. Ids outside the slice, and padding, point at that element,
    so that no mask has to be counted (which would stall a GPU) and no [N, W] mask is ever made.
    """

    start: int
    stop: int
    weight_WD: torch.Tensor
    flat: torch.Tensor
    tile_NW: torch.Tensor
    inside_NK: torch.Tensor
    places_NK: torch.Tensor

    def gather(self, kept_NK: torch.Tensor) -> torch.Tensor:
        """`kept_NK`, with the entries inside this slice replaced by the tile's."""
        return torch.where(self.inside_NK, self.flat.take(self.places_NK), kept_NK)

    def overwrite_(self, values_NK: torch.Tensor | float) -> None:
        """Write values at the row's ids; entries outside the slice are dropped."""
        if isinstance(values_NK, torch.Tensor):
            self.flat.scatter_(0, self.places_NK.view(-1), values_NK.reshape(-1))
        else:
            self.flat.scatter_(0, self.places_NK.view(-1), values_NK)


class Slicer:
    """Walks over the vocabulary and hands out tiles of finished logits in one reused buffer.

    Args:
        hidden_ND, weight_VD, bias_V, ids_NK, plan: as in `linear_gather`.
        buffer: at least N * W + 1 elements of the tiles' type to use again; made when None.
    """

    def __init__(
        self,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        ids_NK: torch.Tensor,
        plan: GatherPlan,
        buffer: torch.Tensor | None = None,
    ) -> None:
        self.weight_VD, self.bias_V, self.ids_NK, self.plan = weight_VD, bias_V, ids_NK, plan
        self.hidden_ND = hidden_ND.to(plan.operand_dtype)
        self.rows = int(hidden_ND.shape[0])
        self.width = slice_columns(self.rows, plan.columns, hidden_ND.device.type, plan.slice_width)
        if buffer is None:
            dtype = accumulation_dtype(hidden_ND, weight_VD)
            buffer = torch.empty(self.rows * self.width + 1, dtype=dtype, device=hidden_ND.device)
        self.buffer = buffer
        self.row_offset_N1 = torch.arange(self.rows, device=hidden_ND.device)[:, None]

    def __iter__(self) -> Iterator[Slice]:
        """The slices in order, with empty tiles: the caller fills them with `fill` if it needs the logits."""
        for start in range(0, self.plan.columns, self.width):
            stop = min(start + self.width, self.plan.columns)
            width = stop - start
            flat = self.buffer[: self.rows * width + 1]
            inside_NK = (self.ids_NK >= start) & (self.ids_NK < stop)
            places_NK = self.row_offset_N1 * width + (self.ids_NK - start)
            yield Slice(
                start=start,
                stop=stop,
                weight_WD=self.weight_VD[start:stop].to(self.plan.operand_dtype),
                flat=flat,
                tile_NW=flat[:-1].view(self.rows, width),
                inside_NK=inside_NK,
                places_NK=torch.where(inside_NK, places_NK, self.rows * width),
            )

    def fill(self, part: Slice) -> torch.Tensor:
        """Write the slice's logits into its tile and return the tile."""
        matmul_into(self.hidden_ND, part.weight_WD.T, part.tile_NW)
        if self.bias_V is not None:
            part.tile_NW.add_(self.bias_V[part.start : part.stop])
        return self.plan.cap_(part.tile_NW)


def softmax_(tile_NW: torch.Tensor) -> torch.Tensor:
    """The logsumexp [N] of each row; the tile becomes its softmax (NaN in rows that are all -inf).

    Two reductions and one fused softmax touch the tile less often than maximum, difference, exp and sum do.
    """
    top_N = tile_NW.amax(dim=1)
    torch.softmax(tile_NW, dim=1, out=tile_NW)
    return torch.where(top_N == float("-inf"), top_N, top_N - tile_NW.amax(dim=1).log())
