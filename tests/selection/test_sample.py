"""`sample:N:T`: importance weights, and draws that do not depend on how they are computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logitcache.selection import Selection, block_uniforms
from logitcache.selection.distribution import Distribution
from logitcache.selection.draws import draw
from logitcache.selection.select import select
from tests.selection.problems import SHAPES, logits_of, realistic_rows, softmax64

EXPONENTS = [0.3, 0.8, 1.5, 2.0]
# torch adds the 262,221 exponentials of the largest vocabulary in float32, which costs 1e-4 of the sum.
NORMALISER = 2e-4


def test_plain_draws_are_pinned() -> None:
    """These were drawn before there were exponents: `sample:N` caches of one seed stay byte for byte what they were."""
    probs = Distribution.from_logits(logits_of(1000)).probs[[1, 2, 7]]
    drawn = draw(probs, torch.from_numpy(block_uniforms(3, [0], 3, 6)))
    assert drawn.tolist() == [[965, 86, 410, 838, 798, 361], [52, 70, 70, 522, 70, 70], [691, 142, 834, 691, 691, 691]]


@pytest.mark.parametrize("draws", [7, 8, 300])
def test_draws_do_not_depend_on_their_number(draws: int) -> None:
    """1,000 columns are 8 groups: from 8 draws on all groups are summed, and the ids must be the same, bit for bit."""
    probs = Distribution.from_logits(logits_of(1000)).probs
    uniforms = torch.from_numpy(block_uniforms(3, [0], len(probs), draws))
    one_by_one = torch.cat([draw(probs, uniforms[:, column : column + 1]) for column in range(draws)], 1)
    assert torch.equal(draw(probs, uniforms), one_by_one)


@pytest.mark.parametrize("vocab_size", SHAPES)
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_weights_are_importance_weights(vocab_size: int, exponent: float) -> None:
    """weight = count / N * p / q with q = p^T / sum(p^T), in float64, on ordinary and on extreme rows."""
    logits, draws = logits_of(vocab_size), 40
    targets = select(
        Selection("sample", draws, exponent=exponent),
        Distribution.from_logits(logits),
        block_uniforms(0, [0], len(logits), draws),
    )
    assert targets.unbiased
    assert np.isinf(targets.threshold).all()
    np.testing.assert_array_equal(targets.tail_mass, 0)
    probs, proposal = softmax64(logits), softmax64(logits.double() * exponent)
    rows = targets.row_index()
    counts = targets.weights * draws * proposal[rows, targets.ids] / probs[rows, targets.ids]
    np.testing.assert_allclose(counts, np.rint(counts), rtol=2 * NORMALISER)
    assert counts.min() > 0.5
    # A weight may be too small for float32; every other draw is kept.
    missing = draws - np.bincount(rows, np.rint(counts), minlength=len(logits))
    assert missing.min() == 0
    assert not missing[[0, 1, 6, 8, 9, 10]].any()


@pytest.mark.parametrize("exponent", [0.3, 0.8, 1.2])
@pytest.mark.parametrize("row", range(5))
def test_mean_and_variance(exponent: float, row: int) -> None:
    """E[weight] = p within 4 standard errors for every id, whatever the exponent; Var = p^2 (1 / q - 1) / N."""
    rows, draws, probs = 8000, 12, realistic_rows(61)[row]
    proposal = probs**exponent / (probs**exponent).sum()
    logits = torch.from_numpy(np.log(probs).astype(np.float32)).expand(rows, -1)
    uniforms = block_uniforms(11, range(rows // 100), 100, draws)
    targets = select(Selection("sample", draws, exponent=exponent), Distribution.from_logits(logits), uniforms)
    dense = np.zeros((rows, probs.size))
    dense[targets.row_index(), targets.ids] = targets.weights
    variances = probs**2 * (1 / proposal - 1) / draws
    error = np.abs(dense.mean(0) - probs)
    assert (error <= 4 * np.sqrt(variances / rows) + 1e-7).all()
    assert error.max() > 0
    squares = np.square(dense - probs).sum(1)
    assert abs(squares.mean() - variances.sum()) <= 4 * squares.std() / np.sqrt(rows)
