"""The hash table of pairs."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.codec.pairs import PairIndex

keys = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 20), unique=True, max_size=60)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(keys, keys)
def test_is_a_dictionary(inside: list[int], asked: list[int]) -> None:
    index = PairIndex(np.array(inside, dtype=np.uint64))
    expected = {key: number for number, key in enumerate(inside)}
    wanted = np.array(inside + asked, dtype=np.uint64)
    assert index.find(wanted).tolist() == [expected.get(int(key), -1) for key in wanted]


def test_keys_that_collide() -> None:
    """Keys whose products share their upper bits want one place; each still finds its own."""
    inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
    same = [(number * inverse) % 2**64 for number in range(1000)]
    index = PairIndex(np.array(same, dtype=np.uint64))
    assert index.find(np.array(same, dtype=np.uint64)).tolist() == list(range(1000))
    others = [(number * inverse) % 2**64 for number in range(1000, 1100)]
    assert index.find(np.array(others, dtype=np.uint64)).tolist() == [-1] * 100
