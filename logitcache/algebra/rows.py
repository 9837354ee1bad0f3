"""Sparse rows in, sparser rows out: numpy only, without a loop over rows.

Legend: N rows, nnz stored entries, K longest row, D draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import counts_of
from logitcache.errors import TargetsError
from logitcache.targets import SparseTargets, offsets_of


def keep_largest(targets: SparseTargets, size: int, mass: float | None = None) -> SparseTargets:
    """The `size` most probable entries of each row, what is left out going to the tail mass.

    With `mass`, only the fewest of them that hold so much. Of equal weights the smaller id comes first.
    """
    _, weights_NK = targets.padded()
    order_NK = np.argsort(-weights_NK, axis=1, kind="stable")[:, :size]
    keep_NK = np.ones(order_NK.shape, dtype=bool)
    if mass is not None:
        falling_NK = np.take_along_axis(weights_NK, order_NK, axis=1).astype(np.float64)
        before_NK = np.pad(np.cumsum(falling_NK, axis=1)[:, :-1], ((0, 0), (1, 0)))
        keep_NK = before_NK < mass
    chosen_NK = np.zeros(weights_NK.shape, dtype=bool)
    np.put_along_axis(chosen_NK, order_NK, keep_NK, axis=1)
    kept = chosen_NK[np.arange(weights_NK.shape[1]) < targets.row_lengths[:, None]]
    dropped = np.bincount(targets.row_index(), np.where(kept, 0.0, targets.weights), minlength=len(targets))
    return SparseTargets(
        offsets_of(kept)[targets.offsets],
        targets.ids[kept],
        targets.weights[kept],
        tail_mass=np.minimum(targets.tail_mass + dropped, 1.0),
        label_logprob=targets.label_logprob,
        entropy=targets.entropy,
        threshold=targets.threshold,
    )


def forget(targets: SparseTargets) -> SparseTargets:
    """Rows without ids or entropy, of which only label_logprob stays: what `label` keeps."""
    return SparseTargets(np.zeros(len(targets) + 1, dtype=np.int64), [], [], label_logprob=targets.label_logprob)


def draw(targets: SparseTargets, uniforms_ND: NDArray[np.float64]) -> SparseTargets:
    """D draws with replacement from the stored entries of each row, in proportion to their weights.

    The tail is left out: E[weight] = weight / sum(weights of the row).

    Args:
        targets: N rows of exact probabilities.
        uniforms_ND: float64 [N, D] in [0, 1).

    Raises:
        TargetsError: a row stores nothing to draw from.
    """
    if (targets.row_lengths == 0).any():
        raise TargetsError(f"row {int(np.argmax(targets.row_lengths == 0))} stores no id that could be drawn")
    rows = targets.row_index()
    sums = targets.row_sums()
    running = np.cumsum(targets.weights, dtype=np.float64)
    # Row n's share of the unit line is [n, n + 1): one search then serves all rows.
    before = np.concatenate([[0.0], running])[targets.offsets[:-1]]
    edges = rows + np.minimum((running - before[rows]) / sums[rows], 1.0)
    aims_ND = np.sort(uniforms_ND, axis=1) + np.arange(len(targets))[:, None]
    picked_ND = np.searchsorted(edges, aims_ND.ravel(), side="right").reshape(aims_ND.shape)
    # At a row's end rounding may point one entry too far, or at one of the row before.
    picked_ND = np.clip(picked_ND, targets.offsets[:-1, None], targets.offsets[1:, None] - 1)
    return _counted(targets, picked_ND)


def thin(targets: SparseTargets, draws: int, uniforms_ND: NDArray[np.float64], size: int) -> SparseTargets:
    """`size` of each row's `draws` draws, every subset of that size equally likely: as if only so many were drawn.

    Counts of a row become multivariate hypergeometric given the old ones, so E[weight] stays what it was.

    Args:
        targets: N rows of D = `draws` draws, weight = count / draws.
        draws: D.
        uniforms_ND: float64 [N, D]; the `size` smallest of a row choose its draws.
        size: draws to keep, at most D.

    Raises:
        TargetsError: the weights of a row are not counts among `draws`.
    """
    entries_ND = np.repeat(np.arange(targets.ids.size), counts_of(targets, draws)).reshape(-1, draws)
    chosen = np.argpartition(uniforms_ND, size - 1, axis=1)[:, :size]
    return _counted(targets, np.take_along_axis(entries_ND, chosen, axis=1))


def _counted(targets: SparseTargets, picked_ND: NDArray[np.int64]) -> SparseTargets:
    """The entries that were picked, with weight count / D."""
    counts = np.bincount(picked_ND.ravel(), minlength=targets.ids.size)
    kept = counts > 0
    return SparseTargets(
        offsets_of(kept)[targets.offsets],
        targets.ids[kept],
        counts[kept] / np.float32(picked_ND.shape[1]),
        label_logprob=targets.label_logprob,
        entropy=targets.entropy,
        unbiased=True,
    )
