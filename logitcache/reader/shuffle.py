"""How well an order shuffles, in two numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ShuffleQuality:
    """What a full permutation has in expectation is 0 and 1.

    Args:
        rank_correlation: Spearman's, between the stored and the read order; 1 for blocks read as they are stored.
        neighbour_distance: how far apart blocks are stored that are read one after another, as a mean and as a share
            of the (n + 1) / 3 of a full permutation.
    """

    rank_correlation: float
    neighbour_distance: float


def shuffle_quality(order: NDArray[np.int64]) -> ShuffleQuality:
    """Measure an epoch's order: int64 [n], n >= 2 distinct block numbers."""
    stored = np.argsort(np.argsort(order, kind="stable"), kind="stable").astype(np.float64)
    correlation = float(np.corrcoef(stored, np.arange(stored.size))[0, 1])
    distance = float(np.abs(np.diff(stored)).mean()) / ((stored.size + 1) / 3)
    return ShuffleQuality(correlation, distance)
