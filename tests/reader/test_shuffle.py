"""The two numbers of a shuffle, and how near to a full permutation the reader's order comes."""

from __future__ import annotations

import numpy as np
import pytest

from logitcache.reader import BlockOrder, shuffle_quality
from tests.reader.test_order import chunks_of


def test_stored_order_and_its_reverse() -> None:
    stored = shuffle_quality(np.arange(100, 200))
    assert stored.rank_correlation == pytest.approx(1)
    assert stored.neighbour_distance == pytest.approx(3 / 101)
    assert shuffle_quality(np.arange(50)[::-1]).rank_correlation == pytest.approx(-1)


def test_only_the_order_of_the_numbers_matters() -> None:
    order = np.random.default_rng(0).permutation(60)
    assert shuffle_quality(order) == shuffle_quality(order**2 + 7)


def test_a_full_permutation() -> None:
    found = [shuffle_quality(np.random.default_rng(seed).permutation(4000)) for seed in range(20)]
    assert abs(np.mean([one.rank_correlation for one in found])) < 0.02
    assert np.mean([one.neighbour_distance for one in found]) == pytest.approx(1, abs=0.01)


def test_the_order_of_a_cache() -> None:
    """128 shards of 8 chunks of 16 blocks; a window of 8 chunks comes from 4 shards."""
    chunks = chunks_of(128, 8, 16)
    stop = chunks[-1].first_block + chunks[-1].num_blocks
    found = [shuffle_quality(BlockOrder("f" * 64, chunks, 0, stop, seed).epoch(0)) for seed in range(5)]
    assert abs(np.mean([one.rank_correlation for one in found])) < 0.1
    assert np.mean([one.neighbour_distance for one in found]) > 0.6
