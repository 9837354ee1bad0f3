"""From how many students on does one dump, read by all of them, take less time than a live teacher beside each.

All times are seconds per token of the corpus, so that its size cancels out. `n` students that each read the corpus `E`
times take

    from a cache          dump + n * E * cached
    with a live teacher          n * E * live

and both take as long at n = dump / (E * (live - cached)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What was measured.

    Args:
        dump: seconds per token of writing the cache, the teacher's forward pass included.
        cached: seconds per token of a step of training from it, reading included.
        live: seconds per token of a step with the teacher in the training loop.
    """

    dump: float
    cached: float
    live: float

    def students(self, epochs: int = 1) -> float:
        """The n at which both take as long, not rounded; inf where a live teacher costs nothing."""
        saved = epochs * (self.live - self.cached)
        return self.dump / saved if saved > 0 else math.inf

    def speed_up(self, students: int, epochs: int = 1) -> float:
        """Time with a live teacher over time with a cache, its dump included."""
        reads = students * epochs
        return reads * self.live / (self.dump + reads * self.cached)
