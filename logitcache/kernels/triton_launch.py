"""What a launch of the Triton kernels needs: whether it can be, how it is cut, and the arguments both directions share.

Legend: N rows (token positions), D width, V rows of the head, W columns of a slice.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from logitcache.errors import ObjectiveError
from logitcache.kernels.plan import GatherPlan


@cache
def kernels() -> ModuleType:
    """The module of kernels. Importing it imports triton."""
    from logitcache.kernels import triton_kernels

    return triton_kernels


def unavailable(device: torch.device, dtype: torch.dtype | None = None, spelling: str = 'impl="{}"') -> str | None:
    """Why the kernels cannot run on `device` (with logits of `dtype`), as one sentence; None if they can.

    `spelling` is how it names an implementation.
    """
    triton, split = spelling.format("triton"), spelling.format("split")
    if dtype == torch.float64:
        reference = spelling.format("reference")
        return f"{triton} has no float64; use {split} or {reference}, or convert the inputs to float32"
    try:
        interpreted = kernels().INTERPRETED
    except ImportError as error:
        return f"{triton} needs the package triton ({error}); install it, or use {split}"
    if interpreted and device.type in ("cpu", "cuda"):
        return None
    if device.type != "cuda":
        return f"{triton} needs a CUDA device, but the device is {device}; use {split}"
    if torch.version.hip is not None:
        return f"{triton} was never tried on ROCm; use {split}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{triton} needs compute capability 8.0, but {device} has {capability}; use {split}"
    return None


def available(device: torch.device) -> bool:
    """Whether the kernels can run on `device`; `unavailable` says why not."""
    return unavailable(device) is None


@dataclass(frozen=True)
class Blocks:
    """How a launch is cut: rows and columns of a tile, steps over D, warps and pipeline stages of a program.

    The forward pass makes at least about `programs` programs, where the vocabulary has that many tiles.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int


def choose_blocks(rows: int, columns: int, dtype: torch.dtype, shared: int | None) -> Blocks:
    """Fixed sizes by shape, type and `shared_bytes`: no autotuning, so that results do not depend on timings."""
    if shared is None:
        # Operators are slow and elements are free there; still, tests are to meet borders of tiles and ranges.
        return Blocks(rows=64, columns=128 if columns <= 4096 else 2048, depth=128, warps=1, stages=1, programs=16)
    # Eight programs for each of an H200's 132 multiprocessors: the last, uneven wave is then a small part of the whole.
    programs = 8 * 132
    if dtype == torch.float32:
        # Exact products (no tf32) run on the ordinary units; larger tiles run out of registers.
        return Blocks(64, 64, 16, 4, 3, programs)
    if rows <= 16:
        return Blocks(16, 128, 64, 4, 3, programs)
    if rows <= 64:
        return Blocks(64, 128, 64, 4, 3, programs)
    if shared < 160 << 10:
        return Blocks(128, 128, 32, 8, 3, programs)
    # 144 KB of shared memory, 128 accumulators a thread: more would not fit into the registers.
    return Blocks(128, 256, 64, 8, 3, programs)


@cache
def shared_bytes(device: torch.device) -> int | None:
    """Shared memory that a program can have there, in bytes; None for the interpreter."""
    if kernels().INTERPRETED:
        return None
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


class Launch:
    """What both directions share: operands in the products' type, blocks, and the kernels' common arguments."""

    def __init__(
        self,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        plan: GatherPlan,
        blocks: Blocks | None,
    ) -> None:
        reason = unavailable(hidden_ND.device, plan.operand_dtype)
        if reason is not None:
            raise ObjectiveError(reason)
        self.plan, self.weight_VD = plan, weight_VD
        self.rows, self.width = int(hidden_ND.shape[0]), int(hidden_ND.shape[1])
        self.hidden_ND = hidden_ND.to(plan.operand_dtype)
        self.bias_V = None if bias_V is None else bias_V.contiguous()
        self.device, self.itemsize = hidden_ND.device, plan.operand_dtype.itemsize
        self.converts = weight_VD.dtype != plan.operand_dtype
        shared = shared_bytes(self.device)
        self.blocks = blocks or choose_blocks(self.rows, plan.columns, plan.operand_dtype, shared)
        self.row_blocks = -(-self.rows // self.blocks.rows)

    def weight(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the weight in the products' type."""
        return self.weight_VD[start:stop].to(self.plan.operand_dtype)

    def on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device, which need not be the tensors'."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def common(self, weight_WD: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of both kernels for a slice of the weight."""
        cap, scale = self.plan.softcap, self.plan.logit_scale
        return {
            "hidden_ptr": self.hidden_ND,
            "weight_ptr": weight_WD,
            "bias_ptr": self.hidden_ND if self.bias_V is None else self.bias_V,
            "N": self.rows,
            "D": self.width,
            "hidden_stride_n": self.hidden_ND.stride(0),
            "hidden_stride_d": self.hidden_ND.stride(1),
            "weight_stride_v": weight_WD.stride(0),
            "weight_stride_d": weight_WD.stride(1),
            "slope": float(scale if cap is None else scale / cap),
            "cap": float(cap or 1.0),
            "inverse_t": 1.0 / self.plan.temperature,
            "HAS_BIAS": self.bias_V is not None,
            "HAS_CAP": cap is not None,
            "EVEN_D": self.width % self.blocks.depth == 0,
            "BLOCK_N": self.blocks.rows,
            "BLOCK_V": self.blocks.columns,
            "BLOCK_D": self.blocks.depth,
            "num_warps": self.blocks.warps,
            "num_stages": self.blocks.stages,
        }
