# mypy: allow-untyped-defs, allow-untyped-decorators
"""The Triton kernels of `triton_gather`: one tile of logits, kept in registers, never written to memory.

Legend: N rows (token positions), D width, V rows of the head, K gathered ids per row, R ranges of the vocabulary,
W columns of a slice. A launch covers columns [first, stop) of the vocabulary; `weight` starts at column `first`.
Only this file imports triton, and only `triton_gather.kernels()` imports this file.
"""

import triton
import triton.language as tl

# Stands for "no further id": larger than any column.
PAST = tl.constexpr(2**31 - 1)


@triton.jit
def tanh(x):
    """tanh to a few units in the last place, from one exp and one division: the interpreter has no libdevice.

    Near 0 the fraction of exponentials cancels; there five terms of Lambert's continued fraction are exact to 1e-9.
    """
    size = tl.abs(x)
    square = x * x
    power = tl.exp(-2.0 * size)
    small = size < 0.6
    above = tl.where(small, size * (945.0 + square * (105.0 + square)), 1.0 - power)
    below = tl.where(small, 945.0 + square * (420.0 + square * 15.0), 1.0 + power)
    value = above / below
    return tl.where(x < 0, -value, value)


@triton.jit
def tile_logits(
    hidden_ptr, weight_ptr, bias_ptr, rows, columns, first, D,
    hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, slope, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Finished logits of `rows` x `columns`, accumulated in float32. Both must be in range: nothing is masked here."""
    d = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride_n + d[None, :] * hidden_stride_d
    weight_ptrs = weight_ptr + (columns - first).to(tl.int64)[None, :] * weight_stride_v + d[:, None] * weight_stride_d
    z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for done in range(0, D, BLOCK_D):
        if EVEN_D:
            hidden = tl.load(hidden_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            hidden = tl.load(hidden_ptrs, mask=d[None, :] < D - done, other=0.0)
            weight = tl.load(weight_ptrs, mask=d[:, None] < D - done, other=0.0)
        # "ieee": float32 operands are not cut down to tf32. Half-precision operands are unaffected.
        z = tl.dot(hidden, weight, z, input_precision="ieee")
        hidden_ptrs += BLOCK_D * hidden_stride_d
        weight_ptrs += BLOCK_D * weight_stride_d
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    z *= slope
    if HAS_CAP:
        z = tanh(z) * cap
    return z


@triton.jit(do_not_specialize=("N", "K", "R", "first_range", "first", "stop", "range_width"))
def gather_forward(
    hidden_ptr, weight_ptr, bias_ptr, tokens_ptr, places_ptr, starts_ptr,
    z_ptr, top_ptr, sum_ptr, sum_t_ptr,
    N, D, K, R, first_range, first, stop, range_width,
    hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, slope, cap, inverse_t,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_T: tl.constexpr, HAS_IDS: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exp(z - maximum) over one range of the vocabulary, for one block of rows.

    Every program owns its piece of the partial results [R, N], so that neither locks nor atomics are needed and the
    result is the same every time. Row blocks run fastest, so that the programs in flight share a range's weights in L2.

    Each row's ids are sorted: `token` is the next one and `place` its index among them. As soon as it lies in the tile,
    its logit is written to z and leaves the sum.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(N, BLOCK_N)
    local_range = program // row_blocks
    rows = (program % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    rows = tl.minimum(rows, N - 1)
    ids_row = rows.to(tl.int64) * K
    part = first_range + local_range
    range_start = first + local_range * range_width
    range_stop = tl.minimum(range_start + range_width, stop)

    if HAS_IDS:
        place = tl.load(starts_ptr + rows.to(tl.int64) * R + part)
        token = tl.load(tokens_ptr + ids_row + place, mask=live & (place < K), other=PAST)
    top = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    total_t = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for tile_start in range(range_start, range_stop, BLOCK_V):
        tile_stop = tl.minimum(tile_start + BLOCK_V, range_stop)
        columns = tile_start + tl.arange(0, BLOCK_V)
        z = tile_logits(
            hidden_ptr, weight_ptr, bias_ptr, rows, tl.minimum(columns, stop - 1), first, D,
            hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, slope, cap,
            HAS_BIAS, HAS_CAP, EVEN_D, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        z = tl.where((columns < tile_stop)[None, :], z, float("-inf"))
        if HAS_IDS:
            inside = token < tile_stop
            while tl.max(inside.to(tl.int32), axis=0) > 0:
                hit = columns[None, :] == token[:, None]
                value = tl.sum(tl.where(hit, z, 0.0), axis=1)
                slot = tl.load(places_ptr + ids_row + place, mask=inside, other=0)
                tl.store(z_ptr + ids_row + slot, value, mask=inside)
                z = tl.where(hit, float("-inf"), z)
                place += inside.to(tl.int32)
                token = tl.load(tokens_ptr + ids_row + place, mask=live & (place < K), other=PAST)
                inside = token < tile_stop
        higher = tl.maximum(top, tl.max(z, axis=1))
        # Where nothing finite was seen yet, 0 stands in for the maximum: -inf - -inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        z -= shift[:, None]
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z), axis=1)
        if HAS_T:
            total_t = total_t * tl.exp((top - shift) * inverse_t) + tl.sum(tl.exp(z * inverse_t), axis=1)
        top = higher
    out = part.to(tl.int64) * N + rows
    tl.store(top_ptr + out, top, mask=live)
    tl.store(sum_ptr + out, total, mask=live)
    if HAS_T:
        tl.store(sum_t_ptr + out, total_t, mask=live)


@triton.jit(do_not_specialize=("N", "first", "stop"))
def gather_backward(
    hidden_ptr, weight_ptr, bias_ptr, factor_ptr, shift_ptr, factor_t_ptr, shift_t_ptr, out_ptr,
    N, D, first, stop, out_stride,
    hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, slope, cap, inverse_t, curve,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_REST: tl.constexpr, HAS_T: tl.constexpr,
    EVEN_D: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of d(loss) / d(raw logits) as it is outside the ids, made in float32 and rounded once.

    (1 - curve * z^2) * (factor * exp(z - shift) + factor_t * exp(z / T - shift_t)). At the ids it is meaningless, and
    may be infinite: `overwrite` comes after it. The output holds whole tiles, so that storing needs no mask, which
    would cost registers; its rows from N on and its columns from `stop` on are garbage.
    """
    row_blocks = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(stop - first, BLOCK_V)
    row_block, tile = block_in_groups(tl.program_id(0), row_blocks, tiles, GROUP)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    out = out_ptr + rows.to(tl.int64)[:, None] * out_stride + tile * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    rows = tl.minimum(rows, N - 1)
    columns = first + tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tile_logits(
        hidden_ptr, weight_ptr, bias_ptr, rows, tl.minimum(columns, stop - 1), first, D,
        hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, slope, cap,
        HAS_BIAS, HAS_CAP, EVEN_D, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    grad = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if HAS_REST:
        grad += tl.exp(z - tl.load(shift_ptr + rows)[:, None]) * tl.load(factor_ptr + rows)[:, None]
    if HAS_T:
        power = tl.exp(z * inverse_t - tl.load(shift_t_ptr + rows)[:, None])
        grad += power * tl.load(factor_t_ptr + rows)[:, None]
    if HAS_CAP:
        grad *= 1.0 - z * z * curve
    tl.store(out, grad.to(out_ptr.dtype.element_ty))


@triton.jit
def block_in_groups(program, row_blocks, tiles, GROUP: tl.constexpr):
    """Row block and tile of a program: GROUP row blocks walk over the tiles together, sharing both operands in L2."""
    group = program // (GROUP * tiles)
    first_row_block = group * GROUP
    size = tl.minimum(row_blocks - first_row_block, GROUP)
    inside = program % (GROUP * tiles)
    return first_row_block + inside % size, inside // size


@triton.jit(do_not_specialize=("total", "K", "first", "stop"))
def overwrite(ids_ptr, values_ptr, out_ptr, total, K, first, stop, out_stride, BLOCK: tl.constexpr):
    """Write the float32 values [N, K], rounded once, at the ids that lie in [first, stop). Ids are unique in a row."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids_ptr + at, mask=at < total, other=-1)
    inside = (token >= first) & (token < stop)
    value = tl.load(values_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + (at // K) * out_stride + (token - first), value.to(out_ptr.dtype.element_ty), mask=inside)


# Kernels run as numpy programs on the CPU if TRITON_INTERPRET=1 was set when triton was imported.
INTERPRETED = not isinstance(overwrite, triton.JITFunction)
