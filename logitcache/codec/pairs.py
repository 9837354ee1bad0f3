"""A hash table from 64-bit keys to small numbers, looked up for whole arrays at once.

Linear probing in a table at most a quarter full: nearly every key is found, or found missing, at the first place. About
four times as fast as `numpy.searchsorted` over the same keys.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Fibonacci hashing: 2^64 divided by the golden ratio, odd.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
FREE = -1


class PairIndex:
    """Where each of some distinct keys stands.

    Args:
        keys: uint64 [P], all different.
    """

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        bits = max(4, (4 * keys.size).bit_length())
        self._shift, self._mask = np.uint64(64 - bits), (1 << bits) - 1
        self._keys = np.zeros(1 << bits, dtype=np.uint64)
        self._numbers = np.full(1 << bits, FREE, dtype=np.int64)
        slot, pending = self._hash(keys), np.arange(keys.size)
        while pending.size:
            wanted = slot[pending]
            free = self._numbers[wanted] == FREE
            # Of several that want one place, the first gets it.
            taken, winner = np.unique(wanted[free], return_index=True)
            winners = pending[free][winner]
            self._keys[taken], self._numbers[taken] = keys[winners], winners
            pending = pending[self._numbers[wanted] != pending]
            slot[pending] = (slot[pending] + 1) & self._mask

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """int64 [n]: the number of each key in the given order, -1 where it is not among them."""
        slot = self._hash(keys)
        numbers = self._numbers[slot]
        missed = np.flatnonzero((self._keys[slot] != keys) & (numbers != FREE))
        while missed.size:
            slot[missed] = (slot[missed] + 1) & self._mask
            found = self._numbers[slot[missed]]
            numbers[missed] = found
            missed = missed[(self._keys[slot[missed]] != keys[missed]) & (found != FREE)]
        return numbers

    def _hash(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        return ((keys * MULTIPLIER) >> self._shift).astype(np.int64)
