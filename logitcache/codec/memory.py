"""Where the arrays that decoding fills come from: made anew, or used again.

Fresh arrays of megabytes cost page faults, which can take longer than decoding into them. Whoever reads chunk after
chunk and copies what it needs therefore hands the same memory to each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# A little more than asked for, so that chunks of slightly different sizes share an array.
SLACK = 16


class Memory:
    """Makes every array anew: what is decoded into them may be kept for ever.

    Attributes:
        narrow: whether ids may be int32, where the vocabulary allows it.
    """

    narrow = False

    def kept(self, name: str, size: int, dtype: DTypeLike) -> NDArray[Any]:
        """An uninitialised array [size] for a part of the result. Each name is asked for once a chunk."""
        return np.empty(size, dtype)

    def scratch(self, name: str, size: int, dtype: DTypeLike) -> NDArray[Any]:
        """An uninitialised array [size] for numbers that nobody reads once the chunk is decoded."""
        return np.empty(size, dtype)


FRESH = Memory()


class Arena:
    """Arrays by name; asking for a name again overwrites what it held."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[np.uint8]] = {}

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    def array(self, name: str, size: int, dtype: DTypeLike) -> NDArray[Any]:
        """An array [size] whose content is whatever was there."""
        needed = size * np.dtype(dtype).itemsize
        array = self._arrays.get(name)
        if array is None or array.nbytes < needed:
            array = self._arrays[name] = np.empty(needed + needed // SLACK, np.uint8)
        return array[:needed].view(dtype)


class ReusedMemory(Memory):
    """Results in one arena, scratch in another, which chunks that are decoded one after another may share.

    A result is valid until the next chunk is decoded into the same arena.
    """

    narrow = True

    def __init__(self, results: Arena, scratch: Arena) -> None:
        self._results, self._scratch = results, scratch

    def kept(self, name: str, size: int, dtype: DTypeLike) -> NDArray[Any]:
        return self._results.array(name, size, dtype)

    def scratch(self, name: str, size: int, dtype: DTypeLike) -> NDArray[Any]:
        return self._scratch.array(name, size, dtype)
