"""The primitive as Triton kernels (`triton_kernels.py`): no tile of the forward pass ever leaves the processor.

Forward: each program reduces a block of rows over a range of the vocabulary to a maximum and a sum, and the partial
results are combined here; no locks, no atomics, the same result every time. Backward: per slice of the vocabulary one
kernel makes the logits' gradient [N, W] in the type of the products, and cuBLAS turns it into the gradients.

Legend: N rows (token positions), D width, V rows of the head, K gathered ids per row, R ranges of the vocabulary,
W columns of a slice.
"""

from __future__ import annotations

import torch

from logitcache.kernels.plan import GatherPlan, Gradients
from logitcache.kernels.products import add_product_, write_product_
from logitcache.kernels.slices import MIN_COLUMNS
from logitcache.kernels.triton_launch import Blocks, Launch, available, kernels, unavailable

__all__ = ["available", "backward", "forward", "unavailable"]

# Bytes of one slice of the logits' gradient, or of a slice of a weight that the products need in another type. Twice
# split's tile: every slice costs one pass over dHidden in float32, and nothing else is alive beside the slice.
SLICE_BYTES = 128 << 20
# No column is that far; the kernels' mark for "no further id".
PAST = 2**31 - 1


def forward(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_NK: torch.Tensor,
    plan: GatherPlan,
    blocks: Blocks | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The primitive of `logitcache.kernels.linear_gather`: lse_rest [N], lse_rest_T [N] (None at T == 1), z [N, K].

    Args: as for `linear_gather`; `blocks` overrides the sizes of the tiles.

    Returns:
        float32 tensors.

    Raises:
        ObjectiveError: the kernels cannot run on this device, or the products are to be in float64.
    """
    launch = Launch(hidden_ND, weight_VD, bias_V, plan, blocks)
    z_NK = torch.full(ids_NK.shape, float("-inf"), dtype=torch.float32, device=launch.device)
    if launch.rows == 0:
        nothing_N = z_NK.new_empty(0)
        return nothing_N, None if plan.temperature == 1 else nothing_N.clone(), z_NK
    range_width, ranges = _cut(launch)
    tokens_NK, places_NK, starts_NR = _sorted_ids(ids_NK, plan.columns, range_width, ranges)
    top_RN, sum_RN, sum_t_RN = (z_NK.new_empty(ranges, launch.rows) for _ in range(3))
    per_slice = _ranges_per_slice(launch, range_width, ranges)
    with launch.on_device():
        for first_range in range(0, ranges, per_slice):
            start, stop = first_range * range_width, min((first_range + per_slice) * range_width, plan.columns)
            count = min(per_slice, ranges - first_range)
            kernels().gather_forward[(launch.row_blocks * count,)](
                tokens_ptr=tokens_NK, places_ptr=places_NK, starts_ptr=starts_NR,
                z_ptr=z_NK, top_ptr=top_RN, sum_ptr=sum_RN, sum_t_ptr=sum_t_RN,
                K=ids_NK.shape[1], R=ranges, first_range=first_range, first=start, stop=stop, range_width=range_width,
                HAS_T=plan.temperature != 1, HAS_IDS=ids_NK.shape[1] > 0,
                **launch.common(launch.weight(start, stop)),
            )  # fmt: skip
    lse_rest_N = _combine(top_RN, sum_RN, 1.0)
    return lse_rest_N, None if plan.temperature == 1 else _combine(top_RN, sum_t_RN, plan.temperature), z_NK


def _cut(launch: Launch) -> tuple[int, int]:
    """Columns of a range (whole tiles), and how many ranges there are."""
    blocks = launch.blocks
    tiles = -(-launch.plan.columns // blocks.columns)
    wanted = min(max(blocks.programs // launch.row_blocks, 1), tiles)
    range_width = -(-tiles // wanted) * blocks.columns
    return range_width, -(-launch.plan.columns // range_width)


def _ranges_per_slice(launch: Launch, range_width: int, ranges: int) -> int:
    """Ranges of one launch: all of them, unless the weight has to be converted, which is done slice by slice."""
    if launch.plan.slice_width is None and not launch.converts:
        return ranges
    width = launch.plan.slice_width or SLICE_BYTES // (launch.itemsize * max(launch.width, 1))
    return max(width // range_width, 1)


def _sorted_ids(
    ids_NK: torch.Tensor, columns: int, range_width: int, ranges: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each row's ids ascending, int32, with padding last; their places in the row; how many lie before each range."""
    valid_NK = (ids_NK >= 0) & (ids_NK < columns)
    tokens_NK, places_NK = torch.where(valid_NK, ids_NK, PAST).to(torch.int32).sort(dim=1)
    borders_R = torch.arange(0, ranges * range_width, range_width, dtype=torch.int32, device=ids_NK.device)
    borders_NR = borders_R.expand(len(ids_NK), ranges).contiguous()
    tokens_NK, places_NK = tokens_NK.contiguous(), places_NK.contiguous()
    return tokens_NK, places_NK, torch.searchsorted(tokens_NK, borders_NR, out_int32=True)


def _combine(top_RN: torch.Tensor, sum_RN: torch.Tensor, temperature: float) -> torch.Tensor:
    """log(sum(exp(z / T))) from each range's maximum of z and sum of exp((z - maximum) / T); -inf for no column."""
    top_N = top_RN.amax(dim=0)
    shift_N = top_N.masked_fill(top_N == float("-inf"), 0.0)
    return (sum_RN * ((top_RN - shift_N) / temperature).exp()).sum(dim=0).log() + top_N / temperature


def backward(
    grads: Gradients,
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_NK: torch.Tensor,
    lse_rest_N: torch.Tensor,
    lse_rest_T_N: torch.Tensor | None,
    z_NK: torch.Tensor,
    plan: GatherPlan,
    wants: tuple[bool, bool, bool],
    blocks: Blocks | None = None,
) -> Gradients:
    """Gradients of hidden, weight and bias, in their types; None where `wants` says so.

    Args:
        grads: of lse_rest [N], lse_rest_T [N] and z [N, K]; None counts as zero.
        lse_rest_N, lse_rest_T_N, z_NK: what `forward` returned.

    Raises:
        ObjectiveError: as for `forward`.
    """
    launch = Launch(hidden_ND, weight_VD, bias_V, plan, blocks)
    gradient = _LogitGradient(launch, grads, ids_NK, lse_rest_N, lse_rest_T_N, z_NK)
    total_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if wants[0] else None
    grad_weight_VD = torch.empty_like(weight_VD) if wants[1] else None
    grad_bias_V = torch.empty_like(bias_V) if wants[2] and bias_V is not None else None
    for grad_V in (grad_weight_VD, grad_bias_V):
        if grad_V is not None:
            grad_V[plan.columns if launch.rows else 0 :] = 0
    with launch.on_device(), torch.autocast(device_type=launch.device.type, enabled=False):
        for start in range(0, plan.columns if launch.rows else 0, gradient.width):
            stop = min(start + gradient.width, plan.columns)
            weight_WD = launch.weight(start, stop)
            tile_NW = gradient.tile(start, stop, weight_WD)
            if grad_bias_V is not None:
                grad_bias_V[start:stop] = tile_NW.sum(dim=0, dtype=torch.float32)
            if total_ND is not None:
                add_product_(total_ND, tile_NW, weight_WD)
            if grad_weight_VD is not None:
                write_product_(grad_weight_VD[start:stop], tile_NW.T, launch.hidden_ND, torch.float32)
    return None if total_ND is None else total_ND.to(hidden_ND.dtype), grad_weight_VD, grad_bias_V


class _LogitGradient:
    """d(loss) / d(raw logits), one slice of the vocabulary at a time, in one reused buffer."""

    def __init__(
        self,
        launch: Launch,
        grads: Gradients,
        ids_NK: torch.Tensor,
        lse_rest_N: torch.Tensor,
        lse_rest_T_N: torch.Tensor | None,
        z_NK: torch.Tensor,
    ) -> None:
        plan = launch.plan
        self.launch, self.ids_NK = launch, ids_NK.contiguous()
        # d(z) / d(raw logit) = scale * (1 - curve * z^2); the factors of the terms carry the scale.
        self.curve = 0.0 if plan.softcap is None else plan.softcap**-2
        self.rest = _term(grads[0], lse_rest_N, plan.logit_scale)
        self.rest_T = None
        if lse_rest_T_N is not None:
            self.rest_T = _term(grads[1], lse_rest_T_N, plan.logit_scale / plan.temperature)
        if grads[2] is None:
            self.sparse_NK = z_NK.new_zeros(z_NK.shape)
        else:
            # Padding has z = -inf but no place in any tile, so that its value here does not matter.
            chain_NK = 1.0 if plan.softcap is None else 1.0 - self.curve * z_NK.square()
            self.sparse_NK = (grads[2] * plan.logit_scale * chain_NK).contiguous()
        self.width = self._width()
        # Whole tiles, which the kernel writes without a mask.
        blocks = launch.blocks
        shape = launch.row_blocks * blocks.rows, -(-self.width // blocks.columns) * blocks.columns
        self.buffer = z_NK.new_empty(shape, dtype=plan.operand_dtype)

    def _width(self) -> int:
        launch = self.launch
        width = launch.plan.slice_width
        if width is None:
            longest = max(launch.rows, launch.width if launch.converts else 0, 1)
            width = max(SLICE_BYTES // (launch.itemsize * longest), MIN_COLUMNS)
            width = -(-width // launch.blocks.columns) * launch.blocks.columns
        return max(1, min(width, launch.plan.columns))

    def tile(self, start: int, stop: int, weight_WD: torch.Tensor) -> torch.Tensor:
        """The gradient of columns [start, stop), [N, stop - start]; valid until the next call."""
        tile_NW = self.buffer[: self.launch.rows, : stop - start]
        if self.rest is None and self.rest_T is None:
            tile_NW.zero_()
        else:
            self._fill(tile_NW, start, stop, weight_WD)
        count = self.ids_NK.numel()
        if count:
            block = 1024
            kernels().overwrite[(-(-count // block),)](
                self.ids_NK, self.sparse_NK, tile_NW, count, self.ids_NK.shape[1], start, stop, tile_NW.stride(0),
                BLOCK=block,
            )  # fmt: skip
        return tile_NW

    def _fill(self, tile_NW: torch.Tensor, start: int, stop: int, weight_WD: torch.Tensor) -> None:
        launch = self.launch
        # A term without a gradient is not read, but its pointers need a tensor.
        spare = self.sparse_NK
        factor, shift = self.rest or (spare, spare)
        factor_t, shift_t = self.rest_T or (spare, spare)
        tiles = -(-(stop - start) // launch.blocks.columns)
        kernels().gather_backward[(launch.row_blocks * tiles,)](
            factor_ptr=factor, shift_ptr=shift, factor_t_ptr=factor_t, shift_t_ptr=shift_t, out_ptr=tile_NW,
            first=start, stop=stop, out_stride=tile_NW.stride(0), curve=self.curve, HAS_REST=self.rest is not None,
            HAS_T=self.rest_T is not None, GROUP=8, **launch.common(weight_WD),
        )  # fmt: skip


def _term(grad_N: torch.Tensor | None, lse_N: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A logsumexp's share of the gradient, factor * exp(z / T - shift), as (factor, shift)."""
    if grad_N is None:
        return None
    # -inf where no column is left: 0 stands in for it, since -inf - -inf would be NaN.
    return (grad_N * scale).contiguous(), lse_N.masked_fill(lse_N == float("-inf"), 0.0).contiguous()
