"""The random stream is part of the format: what a seed and a block give must never change."""

from __future__ import annotations

import numpy as np
import pytest

from logitcache.selection import block_uniforms

PINNED = {
    (0, 0): ["0x1.7a5d3204726c0p-7", "0x1.eeb1585ce5460p-3", "0x1.c8667a55d9028p-4", "0x1.20faf40a5fab6p-1"],
    (1234567890123456789, 7): ["0x1.38b95f3369d4fp-1", "0x1.7e79fdaa244a2p-2"],
    (1234567890123456789, 2**40): ["0x1.775fb2496929ep-1", "0x1.e1a7a017bb439p-1"],
}


@pytest.mark.parametrize(("seed", "block"), PINNED)
def test_the_stream_is_pinned(seed: int, block: int) -> None:
    expected = [float.fromhex(value) for value in PINNED[seed, block]]
    np.testing.assert_array_equal(block_uniforms(seed, [block], 1, len(expected))[0], expected)


def test_a_block_draws_the_same_in_any_company() -> None:
    together = block_uniforms(5, range(3, 9), 10, 4)
    assert together.shape == (60, 4)
    assert together.dtype == np.float64
    for number, block in enumerate(range(3, 9)):
        alone = block_uniforms(5, [block], 10, 4)
        np.testing.assert_array_equal(together[number * 10 : number * 10 + 10], alone)
    np.testing.assert_array_equal(block_uniforms(5, [8, 3], 10, 4)[10:], together[:10])


def test_seeds_and_blocks_give_different_streams() -> None:
    streams = [block_uniforms(seed, [block], 8, 4) for seed in (0, 1, 2**62 - 1) for block in (0, 1, 2**50)]
    values = np.concatenate([stream.ravel() for stream in streams])
    assert np.unique(values).size == values.size
    assert values.min() >= 0
    assert values.max() < 1


def test_the_numbers_are_uniform() -> None:
    stream = block_uniforms(17, range(50), 100, 4).ravel()
    values = np.sort(stream)
    grid = (np.arange(values.size) + 0.5) / values.size
    # Kolmogorov-Smirnov at 20,000 numbers: 0.0138 is passed by chance once in 1,000 streams.
    assert np.abs(values - grid).max() < 0.0138
    for lag in (1, 4, 400):
        assert abs(np.corrcoef(stream[:-lag], stream[lag:])[0, 1]) < 4 / np.sqrt(stream.size)
