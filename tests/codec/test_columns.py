"""Per-row scalars as small integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from logitcache.codec.columns import (
    decode_entropy,
    decode_logprob,
    decode_tail,
    encode_entropy,
    encode_logprob,
    encode_tail,
)
from logitcache.errors import DamagedCacheError

many = settings(max_examples=60, deadline=None, derandomize=True)
column = st.floats(0, 2.0**20, width=32)
masses = arrays(np.float32, st.integers(0, 20), elements=st.floats(0, 1, width=32))


@many
@given(arrays(np.float32, st.integers(0, 20), elements=column | st.just(np.inf) | st.just(np.nan)))
def test_logprobs(values: np.ndarray) -> None:
    codes = encode_logprob(-values)
    assert codes.min(initial=0) >= 0
    decoded = decode_logprob(codes)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, -values, rtol=1e-6, atol=1 / 128)


@many
@given(arrays(np.float32, st.integers(0, 20), elements=column | st.just(np.nan)))
def test_entropies(values: np.ndarray) -> None:
    decoded = decode_entropy(encode_entropy(values))
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, values, rtol=1e-6, atol=1 / 128)


@many
@given(masses)
def test_tails(values: np.ndarray) -> None:
    exact = values.astype(np.float64)
    for tail, head in ((exact, 1 - exact), (1 - exact, exact)):
        codes = encode_tail(tail.astype(np.float32), head)
        assert codes.min(initial=0) >= 0
        for decoded, original in zip(decode_tail(codes), (tail, head), strict=True):
            np.testing.assert_array_equal(decoded == 0, original == 0)
            np.testing.assert_allclose(decoded, original, rtol=1 / 31)


def test_literal_codes() -> None:
    """What FORMAT.md says, in numbers."""
    assert encode_logprob(np.float32([np.nan, -np.inf, 0, -0.0, -1, -2.5])).tolist() == [0, 1, 2, 2, 66, 162]
    assert encode_entropy(np.float32([np.nan, 0, 1, 2.5])).tolist() == [0, 1, 65, 161]
    assert encode_tail(np.float32([0, 1, 0.5, 0.5]), np.array([1, 0, 0.5, 0])).tolist() == [0, 1, 2050, 2050]
    assert encode_tail(np.float32([1e-45, 1, 0.7]), np.array([1, 1e-45, 0])).tolist() == [398, 3708, 2064]
    tail, head = decode_tail(np.array([0, 1, 2050]))
    assert (tail.tolist(), head.tolist()) == ([0, 1, 0.5], [1, 0, 0.5])


@pytest.mark.parametrize("code", [2050 + 2049, 2050 + 10**6, (1 << 63) - 1])
def test_tails_that_no_mass_gives(code: int) -> None:
    decode_tail(np.array([2050 + 2048, 2]))
    with pytest.raises(DamagedCacheError):
        decode_tail(np.array([2050, code]))
