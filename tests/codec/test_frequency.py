"""Token ids and frequency ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.codec import FrequencyRanks
from logitcache.errors import DamagedCacheError, TargetsError


def test_common_ids_get_small_ranks() -> None:
    ranks = FrequencyRanks.from_ids([9, 9, 9, 4, 4, 1, 1, 6], 12)
    assert ranks.listed.tolist() == [9, 1, 4], "6 was seen once; ties go by id"
    assert ranks.decode(np.arange(12)).tolist() == [9, 1, 4, 0, 2, 3, 5, 6, 7, 8, 10, 11]
    assert ranks.encode(np.array([9, 4, 0, 11])).tolist() == [0, 2, 3, 11]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from([1, 2, 300, (1 << 18) + 5]), st.integers(0, 2**32 - 1), st.integers(0, 400))
def test_ranks_are_a_permutation(vocab_size: int, seed: int, pilot: int) -> None:
    rng = np.random.default_rng(seed)
    ranks = FrequencyRanks.from_ids(rng.zipf(1.3, pilot) % vocab_size, vocab_size)
    ids = np.concatenate([rng.integers(0, vocab_size, 50), [0, vocab_size - 1]])
    np.testing.assert_array_equal(ranks.decode(ranks.encode(ids)), ids)
    np.testing.assert_array_equal(ranks.encode(ranks.decode(ids)), ids)
    np.testing.assert_array_equal(np.sort(ranks.decode(np.arange(vocab_size))), np.arange(vocab_size))


def test_a_vocabulary_of_32_bits_needs_no_table_of_that_size() -> None:
    """Beyond the dense limit ranks are computed; they are the same numbers."""
    listed = np.array([2**32 - 1, 5, 0, 7, 6])
    large, small = FrequencyRanks(2**32, listed), FrequencyRanks(10, np.array([9, 5, 0, 7, 6]))
    ids = np.arange(9)
    np.testing.assert_array_equal(large.encode(ids), small.encode(ids))
    edges = np.array([2**32 - 1, 2**32 - 2, 2**31, 8, 1])
    np.testing.assert_array_equal(large.decode(large.encode(edges)), edges)
    assert large.encode(edges).tolist() == [0, 2**32 - 1, 2**31 + 1, 9, 5]


def test_ids_and_ranks_outside_the_vocabulary() -> None:
    ranks = FrequencyRanks.from_ids([3, 3], 10)
    for wrong in (10, -1, 1 << 40):
        with pytest.raises(TargetsError, match=rf"^token id {wrong} is outside the vocabulary of 10 ids$"):
            ranks.encode(np.array([3, wrong]))
        with pytest.raises(DamagedCacheError, match=r"^a stored id rank is outside the vocabulary of 10 ids$"):
            ranks.decode(np.array([3, wrong]))


@pytest.mark.parametrize("listed", [[1, 1], [10], [-1], list(range(11))])
def test_damaged_tables(listed: list[int]) -> None:
    with pytest.raises(DamagedCacheError, match=r"^the frequency table is not a list of distinct ids below 10$"):
        FrequencyRanks(10, np.array(listed))
