"""Compiles the Triton kernels down to machine code for given GPUs, without a GPU; prints facts about each as JSON.

Run in a process without TRITON_INTERPRET: `python -m tests.kernels.compile_triton`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from logitcache.kernels import triton_kernels
from logitcache.kernels.triton_launch import choose_blocks

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
OPERANDS = ("hidden_ptr", "weight_ptr", "bias_ptr", "out_ptr")
INTEGERS = {"tokens_ptr": "*i32", "starts_ptr": "*i32", "places_ptr": "*i64", "ids_ptr": "*i64", "total": "i64"}
FLOATS = ("slope", "cap", "inverse_t", "curve")
# As a launch on contiguous tensors of usual widths finds them: what Triton calls specialisation.
ALIGNED = ("D", "hidden_stride_n", "weight_stride_v", "out_stride")
ONE = ("hidden_stride_d", "weight_stride_d")
PLAIN = {"HAS_BIAS": False, "HAS_CAP": False, "HAS_T": False, "HAS_REST": True, "HAS_IDS": True, "EVEN_D": True}
FULL = {**dict.fromkeys(PLAIN, True), "EVEN_D": False}


def type_of(name: str, dtype: torch.dtype) -> str:
    if name in OPERANDS:
        return "*" + TYPES[dtype]
    if name in FLOATS:
        return "fp32"
    return INTEGERS.get(name, "*fp32" if name.endswith("_ptr") else "i32")


def compile_kernel(
    name: str, dtype: torch.dtype, rows: int, capability: int, shared: int, flags: dict[str, bool]
) -> dict[str, Any]:
    """One kernel with the blocks that a launch of `rows` rows on a GPU with `shared` bytes a block would choose."""
    kernel = getattr(triton_kernels, name)
    blocks = choose_blocks(rows, 100_000, dtype, shared)
    sizes = {"BLOCK_N": blocks.rows, "BLOCK_V": blocks.columns, "BLOCK_D": blocks.depth, "BLOCK": 1024, "GROUP": 8}
    values = {
        key: value for key, value in {**flags, **sizes, **dict.fromkeys(ONE, 1)}.items() if key in kernel.arg_names
    }
    signature = {key: "constexpr" if key in values else type_of(key, dtype) for key in kernel.arg_names}
    aligned = [place for place, key in enumerate(kernel.arg_names) if key.endswith("_ptr") or key in ALIGNED]
    source = ASTSource(kernel, signature, values, {(place,): [["tt.divisibility", 16]] for place in aligned})
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "name": name,
        "dtype": TYPES[dtype],
        "rows": rows,
        "capability": capability,
        "fits": made.metadata.shared <= shared,
        "machine code": len(made.asm["cubin"]),
        "warpgroup products": made.asm["ptx"].count("wgmma.mma_async"),
        "warp products": made.asm["ptx"].count("mma.sync"),
        "tf32": "tf32" in made.asm["ptx"],
    }


def main() -> None:
    hopper, ada = (90, 227 << 10), (89, 99 << 10)
    cases = [
        *((name, torch.bfloat16, 5000, *hopper, FULL) for name in ("gather_forward", "gather_backward")),
        *((name, torch.float32, 5000, *hopper, FULL) for name in ("gather_forward", "gather_backward")),
        *((name, torch.float16, 5000, *ada, PLAIN) for name in ("gather_forward", "gather_backward")),
        ("gather_forward", torch.bfloat16, 10, *hopper, PLAIN),
        ("gather_forward", torch.bfloat16, 60, *hopper, PLAIN),
        ("overwrite", torch.bfloat16, 5000, *hopper, {}),
    ]
    sys.stdout.write(json.dumps([compile_kernel(*case) for case in cases]))


if __name__ == "__main__":
    main()
