"""VarOpt against plain float64 code and against its own statistics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from logitcache.selection import Selection, block_uniforms
from logitcache.selection.distribution import Distribution
from logitcache.selection.select import select
from logitcache.targets import SparseTargets
from tests.codec.rows import assert_equal
from tests.selection.problems import LARGE_VOCABULARY, SHAPES, exact_threshold, logits_of, realistic_rows, systematic

LAST_UNIFORM = 1 - 2.0**-53


def select_varopt(dist: Distribution, size: int, seed: int = 3) -> SparseTargets:
    """Rows with the first two uniform numbers at the ends of their range."""
    uniforms = block_uniforms(seed, [0], len(dist.logits), 1)
    uniforms[:2, 0] = [0.0, LAST_UNIFORM][: len(uniforms)]
    return select(Selection("varopt", size), dist, uniforms)


def of_probs(rows: NDArray[np.float64]) -> Distribution:
    """Distributions whose probabilities are `rows` to float32, bit for bit."""
    logits = torch.from_numpy(np.log(rows, where=rows > 0, out=np.full_like(rows, -np.inf)).astype(np.float32))
    dist = Distribution.from_logits(logits)
    dist.probs = torch.from_numpy(rows.astype(np.float32))
    return dist


def check_row(targets: SparseTargets, row: int, probs: NDArray[np.float64], size: int) -> None:
    """Everything that is promised of one row; `probs` are float64 and sum to 1."""
    one = targets.slice(row, row + 1)
    tau = one.threshold[0]
    assert one.ids.size == min(size, int((probs > 0).sum()))
    assert (probs[one.ids] > 0).all(), "an id of probability 0 was kept"
    assert one.weights.sum(dtype=np.float64) == pytest.approx(1, abs=3e-7)
    np.testing.assert_allclose(tau, exact_threshold(probs, size), rtol=1e-5, atol=1e-44)
    if tau > 1e-37:
        assert np.minimum(1, probs / np.float64(tau)).sum() == pytest.approx(size, rel=1e-5)
    head = one.weights > tau
    np.testing.assert_allclose(one.weights[head], probs[one.ids[head]], rtol=1e-6, atol=1e-44)
    assert (one.weights[~head] == tau).all()
    assert set(np.flatnonzero(probs > tau * (1 + 1e-5))) <= set(one.ids)
    assert (probs[one.ids[~head]] <= tau * (1 + 1e-5) + 1e-44).all()


# ---------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("vocab_size", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 12, 64])
def test_rows(vocab_size: int, size: int) -> None:
    size = min(size, vocab_size)
    dist = Distribution.from_logits(logits_of(vocab_size))
    before = dist.probs.clone()
    targets = select_varopt(dist, size)
    assert torch.equal(dist.probs, before)
    assert targets.unbiased
    np.testing.assert_array_equal(targets.tail_mass, 0)
    probs = before.double().numpy()
    for row in range(len(probs)):
        check_row(targets, row, probs[row] / probs[row].sum(), size)


@pytest.mark.parametrize("vocab_size", [5, 128, 300])
def test_the_whole_vocabulary_is_exact(vocab_size: int) -> None:
    dist = Distribution.from_logits(logits_of(vocab_size))
    targets = select_varopt(dist, vocab_size)
    np.testing.assert_array_equal(targets.threshold, 0)
    np.testing.assert_array_equal(targets.row_lengths, (dist.probs > 0).sum(1).numpy())
    np.testing.assert_allclose(targets.weights, dist.probs[dist.probs > 0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 12])
@pytest.mark.parametrize("outside", [1e-7, 1e-20, 1e-36])
def test_the_tail_of_a_confident_row_is_sampled(size: int, outside: float) -> None:
    """1 - head is 0 or rounding in float32; the tail's mass must come from the tail."""
    probs = np.full((40, 1000), outside / 999)
    probs[:, 7] = 1 - outside
    targets = select_varopt(of_probs(probs), size)
    for row in range(40):
        check_row(targets, row, probs[row] / probs[row].sum(), size)
    if size > 1:
        np.testing.assert_allclose(targets.threshold, outside / (size - 1), rtol=1e-5)
        assert np.unique(targets.ids).size > 10 * size


@pytest.mark.parametrize("off", [0, -1, 1, -300, 300, -3000, 3000])
def test_ids_at_the_threshold_are_never_kept_twice(off: int) -> None:
    """Three ids of 1/4, give or take some float32 steps, beside 250 that share the last quarter: K = 4."""
    probs = np.full((2000, 300), 0.0)
    probs[:, 40:290] = 0.001
    probs[:, [3, 20, 299]] = 0.25 * (1 + off * 2.0**-24)
    probs /= probs.sum(1, keepdims=True)
    targets = select_varopt(of_probs(probs), 4)
    np.testing.assert_array_equal(targets.row_lengths, 4)
    for row in range(0, 2000, 50):
        check_row(targets, row, probs[row], 4)
    small = np.bincount(targets.ids, minlength=300)[40:290]
    assert small.sum() == pytest.approx(2000, abs=10)
    assert small.max() < 30


@pytest.mark.parametrize("uniform", [0.0, 1e-300, LAST_UNIFORM])
@pytest.mark.parametrize("size", [1, 2, 3, 12, 200])
def test_extreme_uniforms_on_sparse_rows(uniform: float, size: int) -> None:
    """Few possible ids, of very unequal mass, and whole groups of impossible ones at both ends."""
    rng = np.random.default_rng(4)
    probs = np.where(rng.random((200, 900)) < 0.05, rng.random((200, 900)) ** 30, 0)
    probs[:, :130] = probs[:, 640:] = 0
    probs[:, 130] += 1e-30
    dist = of_probs(probs / probs.sum(1, keepdims=True))
    targets = select(Selection("varopt", size), dist, np.full((200, 1), uniform))
    for row, exact in enumerate(dist.probs.double().numpy()):
        check_row(targets, row, exact / exact.sum(), size)


@pytest.mark.parametrize(("vocab_size", "size"), [(1000, 12), (1000, 300), (8192, 40), (8192, 2000)])
def test_against_a_running_sum(vocab_size: int, size: int) -> None:
    """Fewer slots than groups of columns, and more."""
    rows = realistic_rows(vocab_size)
    dist = of_probs(np.repeat(rows, 6, axis=0))
    uniforms = block_uniforms(1, [0], len(dist.probs), 1)
    targets = select(Selection("varopt", size), dist, uniforms)
    compared = 0
    for row, probs in enumerate(dist.probs.double().numpy()):
        ids, near = systematic(probs / probs.sum(), size, uniforms[row, 0])
        same = np.isin(targets.slice(row, row + 1).ids, ids)
        # Only an aim at the very edge of two ids may hit the other one.
        assert same.all() or (near < 1e-5 and (~same).sum() <= 3)
        compared += bool(same.all())
    assert compared > len(dist.probs) * 0.7


# ---------------------------------------------------------------------------------------------- statistics


def sampled_moments(probs: NDArray[np.float64], selection: Selection, rows: int) -> tuple[NDArray, NDArray]:
    """Mean weight of each id, and the summed square error of each row, over `rows` independent rows."""
    dist = of_probs(np.broadcast_to(probs, (rows, probs.size)).copy())
    targets = select(selection, dist, block_uniforms(11, range(rows // 100), 100, selection.draws))
    dense = np.zeros((rows, probs.size), dtype=np.float32)
    dense[targets.row_index(), targets.ids] = targets.weights
    return dense.mean(0, dtype=np.float64), np.square(dense - probs).sum(1, dtype=np.float64)


@pytest.mark.parametrize("name", ["zipf", "steep", "peaked", "flat"])
@pytest.mark.parametrize("size", [1, 4, 12, 50])
def test_mean_and_variance(name: str, size: int) -> None:
    """E[weight] = p within 4 standard errors for every id; the variance is the sum over the tail of p (tau - p)."""
    rows, probs = 12_000, realistic_rows(61)[["zipf", "steep", "peaked", "flat"].index(name)]
    tau = exact_threshold(probs, size)
    variances = np.where(probs < tau, probs * (tau - probs), 0)
    mean, errors = sampled_moments(probs, Selection("varopt", size), rows)
    assert (np.abs(mean - probs) <= 4 * np.sqrt(variances / rows) + 1e-7).all()
    assert np.abs(mean - probs).max() > 0
    assert abs(errors.mean() - variances.sum()) <= 4 * errors.std() / np.sqrt(rows) + 1e-6 * variances.sum()


def draws_for(probs: NDArray[np.float64], distinct: int) -> float:
    """How many draws with replacement give so many distinct ids on average."""
    low, high = 1.0, 1e7
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - (1 - probs) ** middle).sum() < distinct else (low, middle)
    return high


@pytest.mark.parametrize("size", [1, 4, 12, 50])
def test_less_variance_than_draws_with_replacement_on_every_row(size: int) -> None:
    """As selected, against `sample:N` of as many draws, and of as many distinct ids (so more draws)."""
    rows = realistic_rows(301)
    thresholds = select_varopt(of_probs(rows), size).threshold.astype(np.float64)
    for probs, tau in zip(rows, thresholds, strict=True):
        mine = np.where(probs < tau, probs * (tau - probs), 0).sum()
        drawn = (probs * (1 - probs)).sum()
        # Of one id nothing but a single draw remains, and that is the same thing.
        slack = 1 + 1e-6 if size == 1 else 1
        assert mine < drawn / size * slack
        assert mine < drawn / draws_for(probs, size) * slack


# ---------------------------------------------------------------------------------------------- independence of batches


@pytest.mark.parametrize("spec", ["varopt:9", "sample:13:0.7"])
@pytest.mark.parametrize("vocab_size", [129, LARGE_VOCABULARY])
def test_sub_batches_and_block_starts_select_the_same(spec: str, vocab_size: int) -> None:
    """What a row keeps depends on the seed, its block and its position, not on the rows beside it."""
    selection, length = Selection.parse(spec), 3
    logits = logits_of(vocab_size)[:12]
    uniforms = block_uniforms(9, range(4, 8), length, selection.draws)
    whole = select(selection, Distribution.from_logits(logits), uniforms)
    for edges in ([0, 1, 4, 12], [0, 6, 12]):
        parts = [
            select(selection, Distribution.from_logits(logits[start:stop]), uniforms[start:stop])
            for start, stop in itertools.pairwise(edges)
        ]
        assert_equal(SparseTargets.concatenate(parts), whole)
    resumed = block_uniforms(9, range(6, 8), length, selection.draws)
    assert_equal(select(selection, Distribution.from_logits(logits[6:]), resumed), whole.slice(6, 12))
