"""Every measure against its formula in float64, row by row; limits and verdicts on figures made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from logitcache.audit import Figure
from logitcache.audit.measures import measure
from logitcache.audit.picked import PickedRows
from logitcache.audit.verdict import FACTOR, ROUNDING, figures_of, worst
from logitcache.selection import Selection
from logitcache.selection.distribution import Distribution
from logitcache.selection.select import select
from logitcache.store import open_cache
from logitcache.targets import SparseTargets
from tests.caches import Dumped

ROWS, VOCABULARY = 40, 50


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def chosen(spec: str, dist: Distribution, seed: int = 0) -> SparseTargets:
    """What a selection keeps, with its columns for label 3."""
    selection = Selection.parse(spec)
    uniforms = np.random.default_rng(seed).random((ROWS, selection.draws)) if selection.draws else None
    labels = torch.full((ROWS,), 3)
    return select(selection, dist, uniforms).with_columns(dist.label_logprob(labels).numpy(), dist.entropy().numpy())


@pytest.fixture(scope="module")
def then() -> Distribution:
    return Distribution.from_logits(logits(0))


@pytest.fixture(scope="module")
def now() -> tuple[Distribution, NDArray[np.float64]]:
    """A teacher a little different, and its log-probabilities."""
    changed = logits(0) + 0.1 * logits(1)
    return Distribution.from_logits(changed), torch.log_softmax(changed.double(), -1).numpy()


def test_scalars(then: Distribution, now: tuple[Distribution, NDArray[np.float64]]) -> None:
    dist, logq = now
    stored = chosen("top-k:5", then)
    labels = torch.full((ROWS,), 3)
    labels[7] = -1
    found = measure(stored, dist, labels)
    assert set(found) == {"label", "entropy", "rows"}
    expected = (stored.label_logprob - logq[:, 3]) ** 2 / 2
    expected[7] = np.nan
    np.testing.assert_allclose(found["label"], expected, rtol=1e-3, atol=1e-8)
    entropy = -(np.exp(logq) * logq).sum(1)
    np.testing.assert_allclose(found["entropy"], (stored.entropy - entropy) ** 2 / 2, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("spec", ["top-k:5", "top-k:50", "top-p:0.8:20", "varopt:9"])
def test_bucketed_kl(spec: str, then: Distribution, now: tuple[Distribution, NDArray[np.float64]]) -> None:
    dist, logq = now
    stored = chosen(spec, then)
    found = measure(stored, dist, torch.full((ROWS,), 3))["rows"]
    for row in range(ROWS):
        one = stored.slice(row, row + 1)
        exact = one.weights > one.threshold[0]
        p, q = one.weights[exact].astype(np.float64), np.exp(logq[row, one.ids[exact]])
        rest, tail = 1 - p.sum(), 1 - q.sum()
        expected = (p * np.log(p / q)).sum() + (rest * np.log(rest / tail) if rest > 1e-6 else 0)
        assert found[row] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert found.mean() > 1e-4


def test_half_squares_of_labels_are_a_kl(then: Distribution, now: tuple[Distribution, NDArray[np.float64]]) -> None:
    """Averaged over labels drawn from p, to second order."""
    _, logq = now
    logp = torch.log_softmax(then.logits.double(), -1).numpy()
    p = np.exp(logp)
    kl = (p * (logp - logq)).sum(1).mean()
    assert (p * (logp - logq) ** 2 / 2).sum(1).mean() == pytest.approx(kl, rel=0.15)


def test_draws(then: Distribution) -> None:
    stored, again = chosen("sample:9", then, seed=0), chosen("sample:9", then, seed=1)
    found = measure(stored, then, torch.full((ROWS,), 3), again)["draws"]
    for row in range(ROWS):
        mine, other = (set(one.slice(row, row + 1).ids.tolist()) for one in (stored, again))
        assert found[row] == pytest.approx(1 - len(mine & other) / max(len(mine), len(other)))
    assert measure(stored, then, torch.full((ROWS,), 3), stored)["draws"].max() == 0
    assert 0 < found.mean() < 1


@pytest.mark.parametrize("spec", ["sample:9", "sample:9:0.7", "varopt:9"])
def test_score(spec: str, then: Distribution, now: tuple[Distribution, NDArray[np.float64]]) -> None:
    _, logq = now
    stored = chosen(spec, then)
    found = measure(stored, now[0], torch.full((ROWS,), 3), scored=True)["score"]
    for row in range(ROWS):
        one = stored.slice(row, row + 1)
        expected = (one.weights * logq[row, one.ids]).sum() - (np.exp(logq[row]) * logq[row]).sum()
        assert found[row] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_impossible_ids() -> None:
    """Log-probabilities of -inf, on either side, and rows without entries make finite numbers."""
    shown = logits(2)
    shown[:, 3] = -torch.inf
    dist = Distribution.from_logits(shown)
    stored = SparseTargets(
        np.append(np.arange(ROWS), ROWS - 1),
        np.full(ROWS - 1, 3),
        np.full(ROWS - 1, 0.25),
        tail_mass=np.append(np.full(ROWS - 1, 0.75), 1.0),
        label_logprob=np.full(ROWS, -np.inf),
        entropy=dist.entropy().numpy(),
    )
    found = measure(stored, dist, torch.full((ROWS,), 3))
    assert (found["label"] == 0).all()
    assert np.isfinite(found["rows"]).all()
    assert found["rows"][:-1].min() > 10
    assert found["rows"][-1] == 0


# --------------------------------------------------------------------------------------------- from rows to words


Means = dict[str, float]


def figures(values: Means, band: Means, precision: Means | None = None) -> list[Figure]:
    def rows(numbers: Means | None) -> Any:
        return None if numbers is None else {name: np.full(30, value) for name, value in numbers.items()}

    return figures_of(rows(values), rows(band), np.arange(30) < 10, rows(precision))


@pytest.mark.parametrize(
    ("label", "precision", "verdict"),
    [(FACTOR * 1e-3, None, "same teacher"), (5e-3, None, "different"), (5e-3, 2e-3, "other precision"),
     (9e-3, 2e-3, "different"), (5e-3, 1e-4, "different")],
)  # fmt: skip
def test_limits(label: float, precision: float | None, verdict: str) -> None:
    other = None if precision is None else {"label": precision}
    made = figures({"label": label}, {"label": 1e-3}, other)
    assert [figure.part for figure in made] == ["start", "rest"]
    assert [figure.rows for figure in made] == [10, 20]
    assert worst(made) == verdict


def test_rounding_is_always_allowed() -> None:
    assert worst(figures({"label": 3.9 * ROUNDING}, {"label": 0.0})) == "same teacher"
    assert worst(figures({"label": 4.1 * ROUNDING}, {"label": 0.0})) == "different"


def test_another_precision_moves_the_scalars_too() -> None:
    """Draws that moved beside labels that did not are no matter of precision."""
    band, precision = {"label": 1e-5, "draws": 0.0}, {"label": 1e-3, "draws": 0.4}
    assert worst(figures({"label": 1e-3, "draws": 0.5}, band, precision)) == "other precision"
    assert worst(figures({"label": 1e-5, "draws": 0.5}, band, precision)) == "different"
    assert worst(figures({"draws": 0.5}, band, precision)) == "other precision"


def test_a_score_is_compared_with_its_own_error() -> None:
    values = np.random.default_rng(0).normal(0, 1, 400)
    at_start = np.zeros(400, dtype=bool)
    [fair] = figures_of({"score": values}, {}, at_start)
    [unfair] = figures_of({"score": values + 0.3}, {}, at_start)
    assert fair.limit == pytest.approx(4 * values.std(ddof=1) / 20)
    assert (fair.verdict, unfair.verdict) == ("same teacher", "different")


# -------------------------------------------------------------------------------------------------- which rows


@pytest.mark.parametrize("rows", [1, 7, 250, 1000, 100_000])
def test_picked_rows_are_rows_of_the_cache(rows: int, dumped: Dumped) -> None:
    cache = open_cache(dumped.top_k)
    picked = PickedRows.of(cache, rows, seed=5)
    assert len(picked) == min(rows, cache.num_tokens)
    places = picked.blocks[picked.block] * cache.block_length + picked.place
    assert (np.diff(places) > 0).all(), "in order, none twice"
    blocks = cache.read_blocks(0, cache.num_blocks)
    assert blocks.valid.ravel()[places].all()
    np.testing.assert_array_equal(picked.tokens, blocks.tokens[picked.blocks])
    expected = blocks.targets.take(places)
    np.testing.assert_array_equal(picked.targets.ids, expected.ids)
    np.testing.assert_array_equal(picked.targets.label_logprob, expected.label_logprob)
    chosen = np.array([1, 2, 5]) if len(picked.blocks) > 5 else np.array([0])
    few = picked.of_blocks(chosen)
    np.testing.assert_array_equal(few.targets.ids, expected.take(picked.rows_of(chosen)).ids)
    np.testing.assert_array_equal(few.blocks, picked.blocks[chosen])
    np.testing.assert_array_equal(
        few.tokens[few.block, few.place], picked.tokens[picked.block, picked.place][picked.rows_of(chosen)]
    )


def test_both_parts_of_blocks_are_picked(dumped: Dumped) -> None:
    picked = PickedRows.of(open_cache(dumped.top_k), 800, seed=0)
    assert 90 < picked.at_start.sum() < 500
    assert (~picked.at_start).sum() > 300
