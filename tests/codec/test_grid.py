"""The grid of probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from logitcache.codec.grid import ProbabilityGrid

GRIDS = [ProbabilityGrid(300), ProbabilityGrid(64), ProbabilityGrid(64, 16), ProbabilityGrid(7, 16**5)]
EVERYTHING = np.concatenate([np.geomspace(1e-45, 1, 4001), [1.0, np.nextafter(0, 1, dtype=np.float32)], [2.0, 900.0]])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_levels_rise_and_invert(grid: ProbabilityGrid) -> None:
    levels = grid.nearest(EVERYTHING)
    assert levels.min() >= 0
    assert (np.diff(levels[:4001]) >= 0).all()
    np.testing.assert_array_equal(grid.nearest(grid.value(levels)), levels)
    few = np.unique(np.concatenate([levels, levels + 1]))
    assert (np.diff(grid.value(few)) > 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_below(grid: ProbabilityGrid) -> None:
    levels = grid.below(EVERYTHING)
    above = EVERYTHING > 1e-44
    assert (grid.value(levels)[above] <= EVERYTHING[above]).all()
    assert (grid.value(levels + 1) > EVERYTHING).all()
    exact = grid.value(np.arange(1024 * grid.fineness, 1024 * grid.fineness + 500))
    np.testing.assert_array_equal(grid.value(grid.below(exact)), exact)


def test_steps_are_even_in_the_root_above_and_in_the_logarithm_below() -> None:
    grid = ProbabilityGrid(300)
    border = (16 / 300) ** 2
    values = grid.value(np.arange(1400))
    upper, lower = values[values >= border], values[values < border]
    np.testing.assert_allclose(np.diff(np.sqrt(upper)), 1 / 300)
    np.testing.assert_allclose(np.diff(np.log(lower)), 0.125)
    assert values[1024] == pytest.approx(border)


def test_rounding_at_random_keeps_the_expected_value() -> None:
    grid, rng = ProbabilityGrid(64), np.random.default_rng(0)
    for probability in (0.5, 0.01, 1e-3, 1e-7):
        values = grid.value(grid.rounded(np.full(20_000, probability), rng.random(20_000)))
        assert len(np.unique(values)) == 2
        assert abs(values.mean() - probability) < 4 * values.std() / np.sqrt(20_000)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_levels_in_the_type_they_are_stored_in(dtype: type) -> None:
    """Levels below the border must not wrap around in an unsigned type."""
    levels = np.arange(0, 3000, 7)
    for grid in (ProbabilityGrid(64), ProbabilityGrid(64, 16), ProbabilityGrid(64, 16**5)):
        np.testing.assert_array_equal(grid.value(levels.astype(dtype)), grid.value(levels))
