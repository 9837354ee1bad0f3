"""Rows as other tools want them: ids by falling probability with their log-probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import InterchangeError
from logitcache.store import Cache
from logitcache.targets import SparseTargets


def refuse_unbiased(cache: Cache, tool: str) -> None:
    """Raise InterchangeError for sampled caches: their weights are estimates, not the teacher's probabilities."""
    if cache.unbiased:
        raise InterchangeError(
            f"{cache.location} holds unbiased samples ({cache.manifest.identity.selection.method}), but {tool} wants "
            "the teacher's own log-probabilities; export --to parquet, or dump with --select top-k:K"
        )
    if not cache.keeps_ids:
        raise InterchangeError(
            f"{cache.location} holds no ids (label), but {tool} wants the most probable ones; export --to parquet, or "
            "dump with --select top-k:K"
        )


def ranked_entries(targets: SparseTargets, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k most probable entries of each row: ids int64 [N, k] and log-probabilities float64 [N, k], falling.

    Raises:
        InterchangeError: a row has fewer than k entries.
    """
    short = targets.row_lengths < k
    if short.any():
        row = int(np.argmax(short))
        raise InterchangeError(
            f"a position has {int(targets.row_lengths[row])} ids, fewer than the {k} that every position must have; "
            "export --to parquet instead"
        )
    chosen = _falling(targets)[:, :k]
    return targets.ids[chosen], _logs(targets.weights[chosen])


def padded_entries(targets: SparseTargets, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All entries of each row, likewise, filled up to k with id 0 and log-probability -inf."""
    filled = np.arange(k) < targets.row_lengths[:, None]
    order = _falling(targets)[filled[:, : int(targets.row_lengths.max(initial=0))]]
    ids = np.zeros(filled.shape, dtype=np.int64)
    logprobs = np.full(filled.shape, -np.inf)
    ids[filled], logprobs[filled] = targets.ids[order], _logs(targets.weights[order])
    return ids, logprobs


def _falling(targets: SparseTargets) -> NDArray[np.int64]:
    """int64 [N, K], K the longest row: each row's entry numbers by falling weight, equal weights by id.

    What stands after a row's last entry belongs to no entry.
    """
    filled = np.arange(int(targets.row_lengths.max(initial=0))) < targets.row_lengths[:, None]
    keys = np.full(filled.shape, np.inf, dtype=np.float32)
    keys[filled] = -targets.weights
    return np.argsort(keys, axis=1, kind="stable") + targets.offsets[:-1, None]


def _logs(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.minimum(np.log(weights.astype(np.float64)), 0.0)
