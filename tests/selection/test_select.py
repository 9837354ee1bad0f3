"""Top-k, top-p and sampling against plain float64 code, on ordinary and on extreme logits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from logitcache.selection import Selection, block_uniforms
from logitcache.selection.distribution import Distribution, largest
from logitcache.selection.draws import count_draws, draw
from logitcache.selection.select import select
from logitcache.targets import SparseTargets
from tests.codec.rows import assert_equal
from tests.selection.problems import LARGE_VOCABULARY, SHAPES, inverse_cdf, logits_of, softmax64

LAST_UNIFORM = 1 - 2.0**-53
# torch adds the 262,221 exponentials of the largest vocabulary in float32, which costs 1e-4 of the sum.
NORMALISER = 2e-4


def row_of(targets: SparseTargets, row: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    one = targets.slice(row, row + 1)
    return one.ids, one.weights


def check_kept(targets: SparseTargets, row: int, probs: NDArray[np.float64]) -> float:
    """The kept are the most probable, at their probability; returns the mass before the least of them."""
    ids, weights = row_of(targets, row)
    assert ids.size
    np.testing.assert_allclose(weights, probs[ids], rtol=NORMALISER, atol=1e-44)
    left_out = np.delete(probs, ids)
    assert left_out.max(initial=0) <= probs[ids].min() * (1 + 1e-6)
    np.testing.assert_allclose(targets.tail_mass[row], left_out.sum(), rtol=1e-5, atol=1e-12)
    return float(probs[ids].sum() - probs[ids].min())


# ---------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("vocab_size", SHAPES)
def test_statistics_against_float64(vocab_size: int) -> None:
    logits = logits_of(vocab_size)
    exact = logits.double()
    dist = Distribution.from_logits(logits)
    torch.testing.assert_close(dist.lse.double(), exact.logsumexp(-1), rtol=1e-6, atol=NORMALISER)
    torch.testing.assert_close(dist.probs.double(), exact.softmax(-1), rtol=NORMALISER, atol=1e-44)
    logprobs = exact.log_softmax(-1)
    entropy = -torch.where(exact.isneginf(), 0.0, logprobs.exp() * logprobs).sum(-1)
    # The expected logit of a row around +-100,000 is lost in float32, and its entropy with it.
    ordinary = logits.abs().nan_to_num(posinf=0).amax(-1) < 1000
    torch.testing.assert_close(dist.entropy()[ordinary].double(), entropy[ordinary], rtol=NORMALISER, atol=NORMALISER)
    labels = torch.arange(len(logits)) % vocab_size
    labels[2] = -1
    picked = dist.label_logprob(labels)
    assert picked[2].isnan()
    labels[2], picked[2] = 0, logprobs[2, 0]
    torch.testing.assert_close(picked.double(), logprobs.gather(1, labels[:, None])[:, 0], rtol=1e-6, atol=NORMALISER)


@pytest.mark.parametrize("row", [[0.0, float("nan")], [0.0, float("inf")], [-float("inf")] * 2])
def test_rows_without_a_softmax_show_in_lse(row: list[float]) -> None:
    lse = Distribution.from_logits(torch.tensor([[1.0, 2.0], row])).lse
    assert lse.isfinite().tolist() == [True, False]


# ---------------------------------------------------------------------------------------------- top-k, top-p


@pytest.mark.parametrize("vocab_size", SHAPES)
@pytest.mark.parametrize("k", [1, 5, 100])
def test_top_k(vocab_size: int, k: int) -> None:
    k = min(k, vocab_size)
    logits = logits_of(vocab_size)
    probs = softmax64(logits)
    targets = select(Selection("top-k", k), Distribution.from_logits(logits))
    assert not targets.unbiased
    possible = (Distribution.from_logits(logits).probs > 0).sum(-1).numpy()
    np.testing.assert_array_equal(targets.row_lengths, np.minimum(k, possible))
    for row in range(len(logits)):
        check_kept(targets, row, probs[row])


@pytest.mark.parametrize("spec", ["top-k:8", "top-p:0.9:8"])
@pytest.mark.parametrize("lead", [8, 16, 24, 60])
def test_the_tail_of_a_confident_row(spec: str, lead: float) -> None:
    """Of float32's softmax, 1 - head would be off by 2e-5, which may be more than there is."""
    logits = 2 * torch.randn(4, 50257, generator=torch.Generator().manual_seed(0))
    logits[:, 5] = logits.amax(1) + lead
    dist = Distribution.from_logits(logits)
    probs, before = softmax64(logits), dist.probs.clone()
    targets = select(Selection.parse(spec), dist)
    assert torch.equal(dist.probs, before)
    for row in range(len(logits)):
        ids, weights = row_of(targets, row)
        assert ids.size == (1 if spec.startswith("top-p") else 8)
        np.testing.assert_allclose(targets.tail_mass[row], np.delete(probs[row], ids).sum(), rtol=1e-6)
        np.testing.assert_allclose(weights, probs[row][ids], rtol=5e-6)


@pytest.mark.parametrize("vocab_size", [50257, 49152, 640])
@pytest.mark.parametrize("k", [1, 3, 64])
def test_largest_is_topk(vocab_size: int, k: int) -> None:
    logits = torch.randn(7, vocab_size, generator=torch.Generator().manual_seed(k))
    logits[0, 5:] = -torch.inf
    logits[1] = logits[1].round()
    ids = largest(logits, k)
    assert torch.equal(logits.gather(1, ids), torch.topk(logits, k).values)
    assert all(len(set(row)) == k for row in ids.tolist())
    assert torch.equal(ids[2:], torch.topk(logits, k).indices[2:])


def test_top_k_of_the_whole_vocabulary_leaves_no_tail() -> None:
    logits = logits_of(300)[:4]
    targets = select(Selection("top-k", 300), Distribution.from_logits(logits))
    np.testing.assert_allclose(targets.tail_mass, 0, atol=1e-6)
    np.testing.assert_array_equal(row_of(targets, 0)[0], np.arange(300))


@pytest.mark.parametrize("vocab_size", SHAPES)
@pytest.mark.parametrize(("mass", "k"), [(0.5, 20), (0.9, 100), (1.0, 50), (1e-6, 3), (0.999, 5)])
def test_top_p(vocab_size: int, mass: float, k: int) -> None:
    k = min(k, vocab_size)
    logits = logits_of(vocab_size)
    probs = softmax64(logits)
    targets = select(Selection("top-p", k, mass), Distribution.from_logits(logits))
    for row in range(len(logits)):
        before = check_kept(targets, row, probs[row])
        kept = row_of(targets, row)[0].size
        assert before < mass + 1e-6, "one id fewer would have held the mass"
        exhausted = kept == min(k, int((probs[row] > 1e-45).sum()))
        assert exhausted or probs[row][row_of(targets, row)[0]].sum() >= mass - 1e-6


def test_extreme_logits_keep_their_probabilities() -> None:
    """Beside a logit of 1e6 a float32 logsumexp is off by 1/32 nat; weights and label must not be."""
    logits = torch.tensor([[1e6, 1e6 - 1, 1e6 - 2, -1e6, -torch.inf]])
    dist = Distribution.from_logits(logits)
    expected = np.exp([0, -1, -2]) / np.exp([0, -1, -2]).sum()
    targets = select(Selection("top-k", 5), dist)
    np.testing.assert_array_equal(targets.ids, [0, 1, 2])
    np.testing.assert_allclose(targets.weights, expected, rtol=1e-6)
    assert dist.label_logprob(torch.tensor([1])).item() == pytest.approx(np.log(expected[1]), abs=1e-6)
    assert dist.label_logprob(torch.tensor([4])).item() == -np.inf


# ---------------------------------------------------------------------------------------------- sampling


def uniforms_with_ends(rows: int, draws: int, seed: int = 3) -> NDArray[np.float64]:
    uniforms = block_uniforms(seed, [0], rows, draws)
    uniforms[:, 0], uniforms[:, 1] = 0.0, LAST_UNIFORM
    return uniforms


@pytest.mark.parametrize("vocab_size", SHAPES)
def test_draws_invert_the_cumulative_distribution(vocab_size: int) -> None:
    logits = logits_of(vocab_size)
    dist = Distribution.from_logits(logits)
    probs = dist.probs.double().numpy()
    uniforms = uniforms_with_ends(len(logits), 40)
    drawn = draw(dist.probs, torch.from_numpy(uniforms)).numpy()
    assert drawn.min() >= 0
    assert drawn.max() < vocab_size
    assert (np.take_along_axis(probs, drawn, 1) > 0).all(), "an id of probability 0 was drawn"
    for row, column in np.ndindex(drawn.shape):
        expected, distance = inverse_cdf(probs[row], uniforms[row, column])
        # Only a number at the very edge of two ids may fall on the other side.
        assert drawn[row, column] == expected or distance < 1e-6


def test_nothing_impossible_is_drawn_at_the_edges_of_groups() -> None:
    """Possible ids lie alone among zeros; a share of the group rounded up to 1 would step past them."""
    probs = torch.zeros(1, 384)
    for column, value in ((0, "0x1.cp-52"), (128, "0x1.4494560p-2"), (256, "0x1.5c14fcp-1")):
        probs[0, column] = float.fromhex(value)
    uniforms = torch.tensor([[0.0, 1e-300, 0.3, LAST_UNIFORM]], dtype=torch.float64)
    assert draw(probs, uniforms).tolist() == [[0, 0, 128, 256]]
    assert draw(probs[:, :300], uniforms).tolist() == [[0, 0, 128, 256]]


def test_extreme_uniforms_on_sparse_rows() -> None:
    rng = np.random.default_rng(4)
    probs = np.where(rng.random((300, 261)) < 0.02, rng.random((300, 261)) ** 30, 0).astype(np.float32)
    probs[:, 130] += 1e-30
    drawn = draw(torch.from_numpy(probs), torch.from_numpy(uniforms_with_ends(300, 12))).numpy()
    assert (np.take_along_axis(probs, drawn, 1) > 0).all()


@pytest.mark.parametrize("vocab_size", [7, 300])
def test_the_mean_weight_is_the_probability(vocab_size: int) -> None:
    """E[weight] = p within 4 standard errors, for every id, over 60,000 draws."""
    rows, draws = 3000, 20
    logits = torch.from_numpy(np.random.default_rng(5).normal(0, 2, (1, vocab_size)).astype(np.float32))
    dist = Distribution.from_logits(logits.expand(rows, -1))
    targets = select(Selection("sample", draws), dist, block_uniforms(11, range(30), 100, draws))
    mean = np.bincount(targets.ids, targets.weights, minlength=vocab_size) / rows
    probs = softmax64(logits)[0]
    error = np.sqrt(probs * (1 - probs) / (rows * draws))
    assert (np.abs(mean - probs) <= 4 * error + 1e-7).all()
    assert np.abs(mean - probs).max() > 0


@pytest.mark.parametrize("draws", [1, 7, 64, 1000])
def test_counts_sum_to_the_draws(draws: int) -> None:
    logits = logits_of(129)
    targets = select(
        Selection("sample", draws), Distribution.from_logits(logits), block_uniforms(0, [0], len(logits), draws)
    )
    assert targets.unbiased
    counts = targets.weights.astype(np.float64) * draws
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-3)
    assert counts.min() > 0.5
    np.testing.assert_array_equal(np.add.reduceat(np.rint(counts), targets.offsets[:-1]), draws)
    np.testing.assert_array_equal(targets.tail_mass, 0)


def test_counting() -> None:
    targets = count_draws(np.array([[5, 2, 5, 5], [1, 1, 1, 1], [3, 2, 1, 0]]))
    expected = SparseTargets(
        [0, 2, 3, 7], [2, 5, 1, 0, 1, 2, 3], [0.25, 0.75, 1, 0.25, 0.25, 0.25, 0.25], unbiased=True
    )
    assert_equal(targets, expected)


@pytest.mark.parametrize("spec", ["top-k:9", "top-p:0.8:20", "sample:13"])
@pytest.mark.parametrize("vocab_size", [129, LARGE_VOCABULARY])
def test_sub_batches_select_the_same(spec: str, vocab_size: int) -> None:
    """What a row keeps does not depend on the rows beside it."""
    selection = Selection.parse(spec)
    logits = logits_of(vocab_size)
    uniforms = block_uniforms(9, [0], len(logits), 13)
    whole = select(selection, Distribution.from_logits(logits), uniforms)
    edges = [0, 1, 4, len(logits)]
    parts = [
        select(selection, Distribution.from_logits(logits[start:stop]), uniforms[start:stop])
        for start, stop in itertools.pairwise(edges)
    ]
    assert_equal(SparseTargets.concatenate(parts), whole)
