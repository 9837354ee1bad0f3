"""Numbers counted in steps, so that any amount of them takes bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"p1": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class Summary:
    """A column in a few numbers; quantiles are by nearest rank.

    Args:
        count: numbers that are known.
    """

    count: int
    mean: float
    p1: float
    p10: float
    p50: float
    p90: float
    p99: float
    least: float
    most: float


class Tally:
    """How often each multiple of a step came. Numbers in between count as the nearest; means are those of the numbers.

    Args:
        step: of 0, step, 2 step, ...
        highest: numbers above it count as it.
    """

    def __init__(self, step: float, highest: float) -> None:
        self.step, self.highest = step, highest
        self.counts = np.zeros(1, dtype=np.int64)
        self.count, self.total = 0, 0.0
        self.least, self.most = math.inf, -math.inf

    def add(self, values: NDArray[Any]) -> None:
        """Count numbers of at least 0; NaN is left out."""
        known = values[~np.isnan(values)].astype(np.float64)
        if not known.size:
            return
        self.count += known.size
        self.total += float(known.sum())
        self.least, self.most = min(self.least, float(known.min())), max(self.most, float(known.max()))
        steps = np.rint(np.clip(known, 0, self.highest) / self.step).astype(np.int64)
        counts = np.bincount(steps, minlength=self.counts.size)
        counts[: self.counts.size] += self.counts
        self.counts = counts

    @property
    def mean(self) -> float:
        """Of all numbers; NaN where there are none."""
        return self.total / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The least number that at least this share of all numbers do not exceed, to half a step."""
        rank = max(1, math.ceil(share * self.count - 1e-9))
        return float(np.searchsorted(np.cumsum(self.counts), rank)) * self.step

    def summary(self) -> Summary | None:
        """None where no number is known."""
        if not self.count:
            return None
        quantiles = {name: self.quantile(share) for name, share in QUANTILES.items()}
        return Summary(count=self.count, mean=self.mean, **quantiles, least=self.least, most=self.most)

    def shares(self, per_bin: int, bins: int) -> NDArray[np.float64]:
        """float64 [bins]: the share of all numbers in each of the first few stretches of `per_bin` steps."""
        counts = np.zeros(per_bin * bins, dtype=np.int64)
        held = self.counts[: counts.size]
        counts[: held.size] = held
        return counts.reshape(bins, per_bin).sum(1) / max(self.count, 1)
