"""Bit-packing and floats against bit strings and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcache.errors import TargetsError
from logitcache.interchange.packing import (
    FLOAT_BYTES,
    bytes_to_floats,
    floats_to_bytes,
    pack_bits,
    packed_bytes,
    unpack_bits,
)
from tests.interchange.captures import bit_string


@given(
    st.integers(1, 56).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), min_size=1)))
)
def test_bits_are_those_of_a_bit_string(made: tuple[int, list[int]]) -> None:
    bits, numbers = made
    packed = pack_bits(np.array([numbers, numbers[::-1]]), bits)
    assert packed.shape == (2, packed_bytes(len(numbers), bits))
    assert [row.tobytes() for row in packed] == [bit_string(numbers, bits), bit_string(numbers[::-1], bits)]
    np.testing.assert_array_equal(unpack_bits(packed, bits, len(numbers)), [numbers, numbers[::-1]])


@pytest.mark.parametrize("number", [-1, 8, 2**40])
def test_numbers_out_of_range_are_refused(number: int) -> None:
    with pytest.raises(TargetsError, match="does not fit in 3 bits"):
        pack_bits(np.array([[0, number]]), 3)


def test_many_rows() -> None:
    """More rows than are packed at once."""
    values = np.random.default_rng(0).integers(0, 2**17, (9000, 5))
    np.testing.assert_array_equal(unpack_bits(pack_bits(values, 17), 17, 5), values)


@pytest.mark.parametrize("dtype", FLOAT_BYTES)
def test_floats_are_torchs(dtype: str) -> None:
    values = np.random.default_rng(1).normal(size=(50, 7)) * 10.0 ** np.arange(-3, 4)
    expected = (
        torch.from_numpy(values).float().to(getattr(torch, dtype))
        if dtype == "bfloat16"
        else torch.from_numpy(values).to(getattr(torch, dtype))
    )
    data = floats_to_bytes(values, dtype)
    assert data.tobytes() == expected.contiguous().view(torch.uint8).numpy().tobytes()
    np.testing.assert_array_equal(bytes_to_floats(data, dtype), expected.double().numpy())


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(np.nan, "float32"), (-np.inf, "bfloat16"), (1e5, "float16"), (3.4e38, "bfloat16"), (1e300, "float32")],
)
def test_floats_that_do_not_fit_are_refused(value: float, dtype: str) -> None:
    with pytest.raises(TargetsError, match=f"cannot be stored as {dtype}"):
        floats_to_bytes(np.array([[0.0, value]]), dtype)
