"""`--blocks 0:100,250,300:`, as a value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import UsageError

_RANGE = re.compile(r"([0-9]{1,18})?(:([0-9]{1,18})?)?")


@dataclass(frozen=True)
class BlockRanges:
    """Ranges [first, stop) of blocks in the order they were given; `stop` None means to the end."""

    ranges: tuple[tuple[int, int | None], ...]

    @classmethod
    def parse(cls, text: str) -> BlockRanges:
        """Read `0:100,250,300:` (stops are exclusive), or `@FILE` with one range a line.

        Raises:
            UsageError: it is not such a list, or the file cannot be read.
        """
        if text.startswith("@"):
            try:
                lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"the block list {text[1:]} cannot be read ({error}); check the path") from error
        else:
            lines = text.split(",")
        parts = [line.strip() for line in lines if line.strip()]
        if not parts:
            raise UsageError("the list of blocks is empty; write for example 0:100,250,300:")
        return cls(tuple(_range(part) for part in parts))

    def blocks(self, num_blocks: int) -> NDArray[np.int64]:
        """int64 [blocks]: the numbers of the blocks of a cache that has `num_blocks`.

        Raises:
            UsageError: a block is not there, comes twice, or a range is empty.
        """
        parts = []
        for first, stop in self.ranges:
            end = num_blocks if stop is None else stop
            if not first < end <= num_blocks:
                raise UsageError(
                    f"blocks {first}:{end} are empty or outside the cache, which has blocks 0:{num_blocks}; "
                    "stops are exclusive"
                )
            parts.append(np.arange(first, end, dtype=np.int64))
        blocks = np.concatenate(parts)
        seen, counts = np.unique(blocks, return_counts=True)
        if seen.size < blocks.size:
            raise UsageError(f"block {int(seen[counts > 1][0])} is listed more than once; list each block once")
        return blocks


def spell(blocks: NDArray[np.int64]) -> str:
    """The shortest list that gives these blocks: equal choices have equal spellings."""
    breaks = np.flatnonzero(np.diff(blocks) != 1) + 1
    runs = zip(blocks[np.append(0, breaks)].tolist(), blocks[np.append(breaks, 0) - 1].tolist(), strict=True)
    return ",".join(str(first) if first == last else f"{first}:{last + 1}" for first, last in runs)


def _range(text: str) -> tuple[int, int | None]:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise UsageError(f"block range {text!r} is not understood; write for example 0:100,250,300:")
    first = int(match[1] or 0)
    if match[2] is None:
        return first, first + 1
    return first, None if match[3] is None else int(match[3])
