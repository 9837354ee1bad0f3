"""Rows of numbers <-> rows of bytes: bit-packed integers and little-endian floats, bfloat16 included.

Legend: N rows, K numbers in a row, M bytes in a row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import TargetsError

MAX_BITS = 56  # an element and the 7 bits before it in its first byte fit in 64 bits
SLICE_ROWS = 4096
_NUMPY_TYPES = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}
FLOAT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` elements of `bits` bits take: rounded up to whole bytes."""
    return (count * bits + 7) // 8


def pack_bits(values_NK: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """uint8 [N, ceil(K * bits / 8)]: elements one after another, most significant bit first, zeros at the end.

    Raises:
        TargetsError: a value needs more than `bits` bits (1 to 56) or is negative.
    """
    if values_NK.size and (values_NK.min() < 0 or int(values_NK.max()) >> bits):
        raise TargetsError(f"a number from {values_NK.min()} to {values_NK.max()} does not fit in {bits} bits")
    count = values_NK.shape[1]
    packed = np.empty((len(values_NK), packed_bytes(count, bits)), dtype=np.uint8)
    whole = (bits + 7) // 8
    for start in range(0, len(values_NK), SLICE_ROWS):
        part = values_NK[start : start + SLICE_ROWS]
        # The last bytes of a big-endian number hold its lowest bits.
        raw = part.astype(">u8").view(np.uint8).reshape(len(part), count, 8)[:, :, 8 - whole :]
        flags = np.unpackbits(raw, axis=2)[:, :, whole * 8 - bits :]
        packed[start : start + SLICE_ROWS] = np.packbits(flags.reshape(len(part), count * bits), axis=1)
    return packed


def unpack_bits(packed_NM: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """int64 [N, count]: the inverse of `pack_bits`. Bits after the last element are ignored."""
    first_bit = np.arange(count) * bits
    first, span = first_bit // 8, (bits + 14) // 8
    # Elements near the end of a row may look at bytes after it; those bits are shifted out.
    padded = np.pad(packed_NM, ((0, 0), (0, span)))
    window = np.zeros((len(packed_NM), count), dtype=np.uint64)
    for step in range(span):
        window = (window << np.uint64(8)) | padded[:, first + step]
    shift = (span * 8 - first_bit % 8 - bits).astype(np.uint64)
    return ((window >> shift) & np.uint64((1 << bits) - 1)).astype(np.int64)


def floats_to_bytes(values_NK: NDArray[np.float64], dtype: str) -> NDArray[np.uint8]:
    """uint8 [N, K * size]: values rounded to `dtype` (a key of FLOAT_BYTES), little-endian.

    Raises:
        TargetsError: a value is not finite, or is too large for `dtype`.
    """
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            raw = np.ascontiguousarray(values_NK, dtype="<f4").view("<u4").astype(np.uint64)
            # Round to nearest, ties to even: what falls off is the lower half of a float32.
            rounded = ((raw + np.uint64(0x7FFF) + ((raw >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(
                "<u2"
            )
            data = rounded.view(np.uint8)
        else:
            data = np.ascontiguousarray(values_NK, dtype=_NUMPY_TYPES[dtype]).view(np.uint8)
    data = data.reshape(len(values_NK), values_NK.shape[1] * FLOAT_BYTES[dtype])
    if not np.isfinite(bytes_to_floats(data, dtype)).all():
        raise TargetsError(f"a value cannot be stored as {dtype}: it is not finite or too large")
    return data


def bytes_to_floats(data_NM: NDArray[np.uint8], dtype: str) -> NDArray[np.float64]:
    """float64 [N, K]: the inverse of `floats_to_bytes`."""
    data = np.ascontiguousarray(data_NM)
    if not data.size:
        return np.zeros((len(data), 0))
    if dtype == "bfloat16":
        return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return data.view(_NUMPY_TYPES[dtype]).astype(np.float64)
