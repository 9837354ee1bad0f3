"""Ragged rows <-> slot-major planes: first all rows' first entries, then all second ones, and so on.

Entries of one slot resemble each other more than entries of one row, so slot-major planes compress better.

Legend: N rows, K longest row, nnz entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import TargetsError
from logitcache.targets import SparseTargets

SLOT_BITS = 16
MAX_LENGTH = (1 << SLOT_BITS) - 1


def slot_mask(lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [K, N]: whether row n has a k-th entry. Boolean indexing with it walks entries slot-major."""
    return np.arange(int(lengths.max(initial=0)))[:, None] < lengths


def spread(plane: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """A slot-major plane [nnz] as int64 [K, N], 0 where a row has ended."""
    grid = np.zeros(mask.shape, dtype=np.int64)
    grid[mask] = plane
    return grid


def to_rows(
    ids_KN: NDArray[np.int64], values_KN: NDArray[np.float32], mask_KN: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Grids in any order within a row -> CSR `offsets`, `ids` (ascending in a row) and `values`."""
    # One sort of a packed key orders ids and remembers which slot each came from; ended slots sort to the end.
    slots = np.arange(ids_KN.shape[0])[:, None]
    keys = np.where(mask_KN, (ids_KN << SLOT_BITS) | slots, np.iinfo(np.int64).max)
    keys_NK = np.sort(np.ascontiguousarray(keys.T), axis=1)
    lengths = mask_KN.sum(0)
    filled = np.arange(keys_NK.shape[1]) < lengths[:, None]
    keys_flat = keys_NK[filled]
    rows = np.repeat(np.arange(lengths.size), lengths)
    values = values_KN[keys_flat & ((1 << SLOT_BITS) - 1), rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return offsets, keys_flat >> SLOT_BITS, values


def grids(
    targets: SparseTargets, order_key: NDArray[Any]
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.float32]]:
    """Mask, ids and weights [K, N] of targets, each row ordered by `order_key` [nnz] ascending."""
    order = np.lexsort((order_key, targets.row_index()))
    lengths = targets.row_lengths
    if (lengths > MAX_LENGTH).any():
        row = int(np.argmax(lengths > MAX_LENGTH))
        raise TargetsError(f"row {row} has {lengths[row]} entries; a cache stores at most {MAX_LENGTH} a row")
    mask = slot_mask(lengths)
    ids = np.zeros(mask.T.shape, dtype=np.int64)
    weights = np.zeros(mask.T.shape, dtype=np.float32)
    ids[mask.T], weights[mask.T] = targets.ids[order], targets.weights[order]
    return mask, ids.T, weights.T
