"""How far stored rows are from the teacher's distributions: one number a row and measure. docs/audit.md explains them.

Legend: n rows, p what is stored, q what the teacher says now.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.selection.distribution import Distribution
from logitcache.targets import SparseTargets

Floats = NDArray[np.float64]
Measured = dict[str, Floats]
# Below it a log-probability says only that the id is as good as impossible.
LEAST_LOGPROB = -100.0
# A tail that float32 probabilities do not show.
LEAST_TAIL = 1e-9


def measure(
    stored: SparseTargets,
    dist: Distribution,
    labels_n: torch.Tensor,
    again: SparseTargets | None = None,
    scored: bool = False,
) -> Measured:
    """What n stored rows say against the teacher's distributions; NaN where a row does not say it.

    Args:
        stored: n rows.
        dist: their distributions now.
        labels_n: int64 [n], their next tokens, negative where there is none.
        again: the same rows drawn again from `dist`, with the random numbers that drew what is stored.
        scored: measure `score` of draws, where they cannot be made again.
    """
    label_n = dist.label_logprob(labels_n).cpu().numpy()
    found = {
        "label": half_square(np.maximum(stored.label_logprob, LEAST_LOGPROB), np.maximum(label_n, LEAST_LOGPROB)),
        "entropy": half_square(stored.entropy, dist.entropy().cpu().numpy()),
    }
    if stored.has_exact_head and stored.ids.size:
        found["rows"] = bucketed_kl(stored.exact_head(), dist)
    if again is not None:
        found["draws"] = moved(stored, again)
    if scored:
        found["score"] = score(stored, dist)
    return found


def half_square(stored_n: NDArray[np.float32], now_n: NDArray[np.float32]) -> Floats:
    """(x - y)^2 / 2: of log-probabilities of ids drawn from p, its mean is KL(p || q) to second order."""
    difference_n = stored_n.astype(np.float64) - now_n
    return difference_n**2 / 2


def bucketed_kl(stored: SparseTargets, dist: Distribution) -> Floats:
    """KL(p || q) in nats over the stored ids and one class for all the rest: a lower bound of the whole KL."""
    rows, ids = stored.row_index(), stored.ids
    p, q = stored.weights.astype(np.float64), np.exp(logprobs_at(dist, rows, ids))
    terms = p * (np.log(np.where(p > 0, p, 1)) - np.log(np.where(p > 0, np.maximum(q, np.exp(LEAST_LOGPROB)), 1)))
    kl_n = np.bincount(rows, terms, minlength=len(stored))
    rest_n = stored.tail_mass.astype(np.float64)
    tail_n = np.maximum(1 - np.bincount(rows, q, minlength=len(stored)), LEAST_TAIL)
    ratio_n = np.where(rest_n > 0, rest_n, 1) / np.where(rest_n > 0, tail_n, 1)
    kl: Floats = np.maximum(kl_n + rest_n * np.log(ratio_n), 0)
    return kl


def moved(stored: SparseTargets, again: SparseTargets) -> Floats:
    """Share of a row's ids that are others when it is drawn again, in [0, 1]."""
    width = 1 + max(int(stored.ids.max(initial=0)), int(again.ids.max(initial=0)))
    keys, mine = stored.row_index() * width + stored.ids, again.row_index() * width + again.ids
    common_n = np.bincount(stored.row_index()[np.isin(keys, mine)], minlength=len(stored))
    return 1 - common_n / np.maximum(np.maximum(stored.row_lengths, again.row_lengths), 1)


def score(stored: SparseTargets, dist: Distribution) -> Floats:
    """sum(w log q) + H(q), nats: 0 on average if the draws come from q."""
    rows = stored.row_index()
    terms = stored.weights * logprobs_at(dist, rows, stored.ids)
    return np.bincount(rows, terms, minlength=len(stored)) + dist.entropy().cpu().numpy()


def logprobs_at(dist: Distribution, rows: NDArray[np.int64], ids: NDArray[np.int64]) -> Floats:
    """float64 [nnz]: log q of ids of rows, at least `LEAST_LOGPROB`."""
    device = dist.logits.device
    row, column = torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device)
    picked = (dist.logits[row, column] - dist.peak[row]) - dist.log_sum[row]
    return np.maximum(picked.cpu().numpy().astype(np.float64), LEAST_LOGPROB)
