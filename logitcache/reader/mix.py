"""Which source gives the block at each place of a mixed stream: a pure function of the weights and the place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Mix:
    """Stride scheduling: the j-th block of source s is due at time (j + 1/2) / w_s, and blocks come when they are due.

    Up to any time t, source s has given w_s * t blocks to within a half, so no place needs the ones before it.

    Args:
        shares: float64 [S], positive, summing to 1.
    """

    def __init__(self, shares: NDArray[np.float64]) -> None:
        self.shares = shares

    def places(self, start: int, count: int) -> tuple[Ints, Ints]:
        """Of places [start, start + count): the source int64 [count], and the place in its own stream int64 [count]."""
        if self.shares.size == 1:
            return np.zeros(count, dtype=np.int64), np.arange(start, start + count)
        # At this time fewer than `start` blocks have come, and at the end more than `start + count`.
        begin, end = start - self.shares.size, start + count + self.shares.size
        first = np.maximum(0, np.ceil(begin * self.shares - 0.5)).astype(np.int64)
        stop = np.ceil(end * self.shares - 0.5).astype(np.int64) + 1
        source = np.repeat(np.arange(self.shares.size), stop - first)
        own = np.concatenate([np.arange(low, high) for low, high in zip(first, stop, strict=True)])
        order = np.lexsort((source, (own + 0.5) / self.shares[source]))
        picked = order[start - int(first.sum()) :][:count]
        return source[picked], own[picked]
