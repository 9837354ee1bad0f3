"""Random sparse rows for the tests of targets, codec and store."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from logitcache.targets import SparseTargets

COLUMNS = ("tail_mass", "label_logprob", "entropy", "threshold")


def side_columns(rng: np.random.Generator, rows: int) -> dict[str, NDArray[np.float32]]:
    """label_logprob and entropy with NaN, zero, large and infinite values among them."""
    label = -rng.exponential(3, rows).astype(np.float32)
    entropy = rng.exponential(3, rows).astype(np.float32)
    label[rng.random(rows) < 0.1] = np.nan
    label[rng.random(rows) < 0.1] = -np.inf
    label[rng.random(rows) < 0.1] = 0
    entropy[rng.random(rows) < 0.1] = np.nan
    entropy[rng.random(rows) < 0.1] = 50_000
    return {"label_logprob": label, "entropy": entropy}


def probability_rows(rng: np.random.Generator, rows: int, vocab_size: int, longest: int) -> SparseTargets:
    """Rows of 0 to `longest` exact probabilities, spiky or flat, with the rest in the tail."""
    lengths = rng.integers(0, min(longest, vocab_size) + 1, rows)
    ids, weights = [], []
    for length in lengths:
        mass = rng.gamma(rng.choice([0.05, 1.0, 50.0]), size=length + 1) + 1e-12
        ids.append(np.sort(rng.choice(vocab_size, length, replace=False)))
        weights.append((mass / mass.sum())[:length])
    return SparseTargets(
        np.concatenate([[0], np.cumsum(lengths)]), _flat(ids), _flat(weights), **side_columns(rng, rows)
    )


def count_rows(rng: np.random.Generator, rows: int, vocab_size: int, draws: int) -> SparseTargets:
    """Rows of `draws` draws with replacement, from few or from many ids."""
    ids, weights = [], []
    for _ in range(rows):
        drawn = rng.integers(0, rng.choice([1, 5, vocab_size]), draws) % vocab_size
        distinct, counts = np.unique((drawn + rng.integers(vocab_size)) % vocab_size, return_counts=True)
        ids.append(distinct)
        weights.append(counts / draws)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    return SparseTargets(offsets, _flat(ids), _flat(weights), unbiased=True, **side_columns(rng, rows))


def varopt_rows(rng: np.random.Generator, rows: int, vocab_size: int, size: int) -> SparseTargets:
    """Rows as VarOpt sampling makes them: heads above the threshold, a tail at it, all summing to 1."""
    size = min(size, vocab_size)
    ids, weights, thresholds = [], [], []
    for _ in range(rows):
        heads = int(rng.integers(0, size + 1))
        tail = 0.0 if heads == size else 1.0 if heads == 0 else float(rng.choice([1e-6, 0.01, 0.3]))
        threshold = tail / (size - heads) if heads < size else 0.0
        head = np.full(heads, 1.02 * threshold)
        spare = 1 - tail - head.sum()
        if spare < 0:
            heads, tail, threshold, head, spare = 0, 1.0, 1 / size, np.zeros(0), 0.0
        if heads:
            head += spare * rng.dirichlet(np.full(heads, rng.choice([0.1, 1.0, 100.0])))
        ids.append(np.sort(rng.choice(vocab_size, size, replace=False)))
        weights.append(rng.permutation(np.append(np.maximum(head, 1e-30), np.full(size - heads, threshold))))
        thresholds.append(threshold)
    offsets = np.arange(rows + 1) * size
    threshold = np.array(thresholds, dtype=np.float32)
    flat = _flat(weights).astype(np.float32)
    return SparseTargets(offsets, _flat(ids), flat, threshold=threshold, unbiased=True, **side_columns(rng, rows))


def weight_rows(rng: np.random.Generator, rows: int, vocab_size: int, longest: int) -> SparseTargets:
    """Rows of importance weights: any positive numbers, whose sum need not be 1."""
    lengths = rng.integers(0, min(longest, vocab_size) + 1, rows)
    ids = [np.sort(rng.choice(vocab_size, length, replace=False)) for length in lengths]
    weights = np.exp(rng.uniform(-90, 3, int(lengths.sum())))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return SparseTargets(offsets, _flat(ids), weights, unbiased=True, **side_columns(rng, rows))


def assert_equal(one: SparseTargets, other: SparseTargets) -> None:
    """Equal in every bit, NaN included."""
    assert one.unbiased == other.unbiased
    for name in ("offsets", "ids", "weights", *COLUMNS):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.dtype == theirs.dtype, name
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


def _flat(parts: list[NDArray]) -> NDArray:  # type: ignore[type-arg]
    return np.concatenate([np.zeros(0, dtype=parts[0].dtype), *parts]) if parts else np.zeros(0, dtype=np.int64)


generators = st.builds(np.random.default_rng, st.integers(0, 2**32 - 1))
