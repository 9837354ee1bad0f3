"""Rows of which only the most probable ids are known -> SparseTargets. Torch-free.

Legend: N rows, K known entries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitcache.selection.spec import Selection
from logitcache.targets import SparseTargets, offsets_of


def select_ranked(selection: Selection, ids_NK: NDArray[np.int64], logprobs_NK: NDArray[np.float64]) -> SparseTargets:
    """What `top-k:k` or `top-p:P:k` keeps of each row, k <= K: the same as of the whole distribution.

    Args:
        selection: not a sampled one: the K most probable ids do not tell what would be drawn of the others.
        ids_NK: int64 [N, K], distinct in a row.
        logprobs_NK: float64 [N, K], log p of the full softmax in nats, falling in each row.

    Returns:
        SparseTargets of N rows, without label_logprob and entropy. Entries of probability 0 are left out.
    """
    assert not selection.draws
    ids_Nk, weights_Nk = ids_NK[:, : selection.size], np.exp(logprobs_NK[:, : selection.size]).astype(np.float32)
    if selection.mass is not None:
        before_Nk = weights_Nk.cumsum(1, dtype=np.float64) - weights_Nk
        weights_Nk = np.where(before_Nk < selection.mass, weights_Nk, np.float32(0))
    tail_N = np.clip(1 - weights_Nk.sum(1, dtype=np.float64), 0, 1)
    order_Nk = np.argsort(ids_Nk, axis=1)
    ids_Nk = np.take_along_axis(ids_Nk, order_Nk, 1)
    weights_Nk = np.take_along_axis(weights_Nk, order_Nk, 1)
    kept_Nk = weights_Nk > 0
    return SparseTargets(offsets_of(kept_Nk.sum(1)), ids_Nk[kept_Nk], weights_Nk[kept_Nk], tail_mass=tail_N)
