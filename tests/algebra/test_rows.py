"""Row operations against plain loops, and their statistics against the distributions they claim."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.algebra.rows import draw, keep_largest, thin
from logitcache.errors import TargetsError
from logitcache.selection import block_uniforms
from logitcache.targets import SparseTargets
from tests.codec.rows import generators, probability_rows


def naive_largest(targets: SparseTargets, row: int, size: int, mass: float | None) -> list[int]:
    entries = range(int(targets.offsets[row]), int(targets.offsets[row + 1]))
    falling = sorted(entries, key=lambda entry: (-targets.weights[entry], targets.ids[entry]))[:size]
    kept, held = [], 0.0
    for entry in falling:
        if mass is None or held < mass:
            kept.append(entry)
        held += float(targets.weights[entry])
    return sorted(kept)


@settings(max_examples=60, deadline=None)
@given(generators, st.integers(1, 12), st.sampled_from([None, 0.3, 0.9, 1.0]))
def test_keep_largest_is_the_plain_loop(rng: np.random.Generator, size: int, mass: float | None) -> None:
    targets = probability_rows(rng, 9, 40, 12)
    kept = keep_largest(targets, size, mass)
    for row in range(9):
        entries = naive_largest(targets, row, size, mass)
        mine = kept.slice(row, row + 1)
        np.testing.assert_array_equal(mine.ids, targets.ids[entries])
        np.testing.assert_array_equal(mine.weights, targets.weights[entries])
    whole = np.minimum(targets.row_sums() + targets.tail_mass, 1.0)
    np.testing.assert_allclose(kept.row_sums() + kept.tail_mass, whole, atol=1e-6)
    np.testing.assert_array_equal(kept.label_logprob, targets.label_logprob)
    np.testing.assert_array_equal(kept.entropy, targets.entropy)


def test_equal_weights_keep_the_smaller_id() -> None:
    kept = keep_largest(SparseTargets([0, 4], [3, 5, 7, 9], [0.2, 0.3, 0.2, 0.2]), 2)
    assert kept.ids.tolist() == [3, 5]
    assert kept.tail_mass[0] == pytest.approx(0.5)


def test_a_whole_row_keeps_a_tail_of_exactly_zero() -> None:
    """Rounding of sums must not make a tail where there is none."""
    weights = np.full(10, 0.1, dtype=np.float32)
    targets = SparseTargets([0, 10], np.arange(10), weights, tail_mass=[0.0])
    assert keep_largest(targets, 10).tail_mass[0] == 0.0


def standard_errors(mean: np.ndarray, expected: np.ndarray, per_row_variance: np.ndarray, rows: int) -> np.ndarray:
    return np.abs(mean - expected) / np.sqrt(per_row_variance / rows + 1e-12)


P = np.array([0.4, 0.2, 0.15, 0.1, 0.05, 0.02], dtype=np.float32)  # 0.08 in the tail
IDS = np.array([2, 3, 11, 17, 29, 31])
ROWS = 40_000


def repeated(weights: np.ndarray, unbiased: bool = False) -> SparseTargets:
    """ROWS equal rows."""
    offsets = np.arange(ROWS + 1) * weights.size
    return SparseTargets(offsets, np.tile(IDS[: weights.size], ROWS), np.tile(weights, ROWS), unbiased=unbiased)


def mean_weights(targets: SparseTargets) -> np.ndarray:
    return np.bincount(targets.ids, targets.weights, minlength=IDS[-1] + 1)[IDS] / len(targets)


@pytest.mark.parametrize("draws", [1, 3, 25])
def test_draws_are_unbiased_for_the_stored_distribution(draws: int) -> None:
    """E[weight] = p / (1 - tail) within 4 standard errors, and the variance is that of independent draws."""
    drawn = draw(repeated(P), block_uniforms(7, range(1), ROWS, draws))
    stored = P / P.sum()
    assert drawn.unbiased
    assert (drawn.tail_mass == 0).all()
    np.testing.assert_allclose(drawn.row_sums(), 1, atol=1e-5)
    assert (standard_errors(mean_weights(drawn), stored, stored * (1 - stored) / draws, ROWS) < 4).all()
    squares = np.bincount(drawn.ids, drawn.weights.astype(np.float64) ** 2, minlength=IDS[-1] + 1)[IDS] / ROWS
    np.testing.assert_allclose(squares - stored**2, stored * (1 - stored) / draws, rtol=0.15)


def test_draws_of_every_row_come_from_that_row() -> None:
    """Ragged rows, and uniforms at both ends of [0, 1)."""
    targets = probability_rows(np.random.default_rng(4), 3000, 50, 9)
    targets = targets.take(np.flatnonzero(targets.row_lengths))
    uniforms = np.random.default_rng(5).random((len(targets), 6))
    uniforms[:, 0], uniforms[:, 1] = 0.0, np.nextafter(1.0, 0.0)
    drawn = draw(targets, uniforms)
    stored = set(zip(targets.row_index().tolist(), targets.ids.tolist(), strict=True))
    assert set(zip(drawn.row_index().tolist(), drawn.ids.tolist(), strict=True)) <= stored
    counts = np.rint(drawn.weights * 6)
    np.testing.assert_array_equal(np.bincount(drawn.row_index(), counts), np.full(len(targets), 6))
    # u = 0 is the first entry.
    first = set(zip(range(len(targets)), targets.ids[targets.offsets[:-1]].tolist(), strict=True))
    assert first <= set(zip(drawn.row_index().tolist(), drawn.ids.tolist(), strict=True))


def test_nothing_to_draw_from() -> None:
    with pytest.raises(TargetsError, match="row 1 stores no id that could be drawn"):
        draw(SparseTargets([0, 1, 1], [4], [0.5]), np.zeros((2, 3)))


@pytest.mark.parametrize("size", [1, 4, 12])
def test_thinned_counts_are_hypergeometric(size: int) -> None:
    """Mean and variance of each count, given the old counts; the weights' mean is unchanged."""
    counts = np.array([6, 3, 2, 1])
    rows = repeated((counts / 12).astype(np.float32), unbiased=True)
    thinned = thin(rows, 12, block_uniforms(9, range(1), ROWS, 12), size)
    share = counts / 12
    variance = size * share * (1 - share) * (12 - size) / 11
    new = np.zeros((ROWS, 4))
    new[thinned.row_index(), np.searchsorted(IDS, thinned.ids)] = np.rint(thinned.weights * size)
    np.testing.assert_array_equal(new.sum(1), size)
    assert (standard_errors(new.mean(0) / size, share, variance / size**2, ROWS) < 4).all()
    np.testing.assert_allclose(new.var(0), variance, rtol=0.05, atol=1e-9)


def test_thinning_draws_is_unbiased_for_the_teacher() -> None:
    """Draws, thinned twice, still average to p."""
    uniforms = [block_uniforms(seed, range(1), ROWS, draws) for seed, draws in ((1, 20), (2, 20), (3, 8))]
    twice = thin(thin(draw(repeated(P), uniforms[0]), 20, uniforms[1], 8), 8, uniforms[2], 3)
    p = P / P.sum()
    assert (standard_errors(mean_weights(twice), p, p * (1 - p) / 3, ROWS) < 4).all()


def test_thinning_wants_counts() -> None:
    targets = SparseTargets([0, 2, 4], [1, 2, 1, 2], [0.5, 0.5, 0.3, 0.7], unbiased=True)
    with pytest.raises(TargetsError, match="row 1's weights are not counts among 4 draws"):
        thin(targets, 4, np.zeros((2, 4)), 2)
