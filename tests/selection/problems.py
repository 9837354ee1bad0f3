"""Logits to select from, and the plain float64 way of selecting."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

VOCABULARIES = (5, 127, 128, 129, 300, 1000)
LARGE_VOCABULARY = (1 << 18) + 77
SHAPES = (*VOCABULARIES, LARGE_VOCABULARY)


def logits_of(vocab_size: int, seed: int = 0) -> torch.Tensor:
    """float32 [n, V]: ordinary rows, and every kind of extreme row that has a softmax."""
    rng = np.random.default_rng([seed, vocab_size])
    rows = [rng.normal(0, scale, vocab_size) for scale in (0.0, 1.0, 5.0, 40.0)]
    rows.append(rng.normal(0, 3, vocab_size) + 1e5)
    rows.append(rng.normal(0, 3, vocab_size) - 1e5)
    rows.append(rng.integers(0, 3, vocab_size))
    rows.append(np.where(rng.random(vocab_size) < 0.5, -np.inf, rng.normal(0, 3, vocab_size)))
    rows += [one_hot(vocab_size, hot) for hot in (0, vocab_size // 2, vocab_size - 1)]
    spike = rng.normal(0, 1, vocab_size)
    spike[vocab_size - 1] = 60
    rows.append(spike)
    rows[7][vocab_size // 3] = 0.0
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def one_hot(vocab_size: int, hot: int) -> NDArray[np.float64]:
    row = np.full(vocab_size, -np.inf)
    row[hot] = 3.0
    return row


def softmax64(logits: torch.Tensor) -> NDArray[np.float64]:
    """float64 [n, V]."""
    return torch.softmax(logits.double(), -1).numpy()


def inverse_cdf(probs: NDArray[np.float64], uniform: float) -> tuple[int, float]:
    """The id whose stretch of the cumulative distribution holds `uniform`, and the distance to the nearest edge."""
    edges = np.cumsum(probs)
    aim = uniform * edges[-1]
    return int(np.searchsorted(edges, aim, side="right")), float(np.abs(edges - aim).min())


def realistic_rows(vocab_size: int) -> NDArray[np.float64]:
    """float64 [6, V] probabilities in shuffled order: Zipf, steep Zipf, confident, flat, an ordinary one, few ids."""
    rng = np.random.default_rng([7, vocab_size])
    places = np.arange(1, vocab_size + 1.0)
    rows = [1 / places, places**-1.7, np.full(vocab_size, 0.3 / vocab_size), np.ones(vocab_size)]
    rows[2][0] = 1
    rows += [np.exp(rng.normal(0, 2, vocab_size)), np.where(places < 60, 1 / places, 0)]
    return np.stack([rng.permutation(row / row.sum()) for row in rows])


def exact_threshold(probs: NDArray[np.float64], size: int) -> float:
    """tau with sum(min(1, p / tau)) = size, by trying every length of the head; 0 where at most `size` are possible."""
    falling = np.sort(probs)[::-1]
    if falling[size:].sum() == 0:
        return 0.0
    shares = np.cumsum(falling[::-1])[::-1][:size] / np.arange(size, 0, -1)
    return float(shares[np.argmax(falling[:size] <= shares)])


def systematic(probs: NDArray[np.float64], size: int, uniform: float) -> tuple[NDArray[np.int64], float]:
    """Head and sampled tail by one running sum, and how near the nearest aim is to an edge, in shares of tau."""
    tau = exact_threshold(probs, size)
    head = probs >= tau * (1 - 1e-7)
    slots = size - int(head.sum())
    edges = np.cumsum(np.where(head, 0, probs))
    aims = (uniform + np.arange(slots)) / max(slots, 1) * edges[-1]
    hits = np.searchsorted(edges, aims, side="right")
    near = min((float(np.abs(edges - aim).min()) / max(tau, 1e-300) for aim in aims), default=1.0)
    return np.sort(np.concatenate([np.flatnonzero(head), hits])), near
