"""From numbers of rows to one of three words: what noise the teacher makes itself is measured, and multiplied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from logitcache.audit.measures import Floats, Measured

Verdict = Literal["same teacher", "other precision", "different"]
VERDICTS: tuple[Verdict, ...] = ("same teacher", "other precision", "different")
# Measures grow with the square of a difference of log-probabilities: four times is twice the noise.
FACTOR = 4.0
# What rounding to 1/64 nat makes of `label` and `entropy`, (1/64)^2 / 24; few rows may measure less by chance.
ROUNDING = 1e-5
# Draws fall between thousands of ids: 1e-3 nats of noise in every logit move 7 % of those of a real teacher.
FLOORS = {"label": ROUNDING, "entropy": ROUNDING, "rows": ROUNDING, "draws": 0.05}
SCALARS = ("label", "entropy")
# A mean of independent rows is beyond four of its standard errors once in 16,000 times.
SCORE_ERRORS = 4.0


@dataclass(frozen=True)
class Figure:
    """One measure over the rows of one part of the blocks. `draws` is a share, all others are in nats.

    Args:
        measure: "label", "entropy", "rows", "draws" or "score" (see docs/audit.md).
        part: "start", the first 16 positions of blocks, or "rest".
        rows: how many say something.
        mean, median, p99: of the cache against the teacher.
        band: mean of the teacher, as if it had just been dumped, against itself at another batch size.
        limit: the largest mean of the same teacher.
        precision: as `band`, against the teacher in another dtype; None where that was not needed.
        precision_limit: the largest mean of the same teacher in another precision.
    """

    measure: str
    part: str
    rows: int
    mean: float
    median: float
    p99: float
    band: float
    limit: float
    precision: float | None = None
    precision_limit: float | None = None

    @property
    def verdict(self) -> Verdict:
        """What this figure alone says."""
        if abs(self.mean) <= self.limit:
            return "same teacher"
        within = self.precision_limit is not None and abs(self.mean) <= self.precision_limit
        return "other precision" if within else "different"


def worst(figures: Sequence[Figure]) -> Verdict:
    """The verdict that all figures allow.

    Another precision moves every figure: where the scalars of the rows are the teacher's to the last digit, it excuses
    nothing else.
    """
    found = VERDICTS[max((VERDICTS.index(figure.verdict) for figure in figures), default=0)]
    scalars = [figure.verdict for figure in figures if figure.measure in SCALARS]
    return "different" if found == "other precision" and scalars and set(scalars) == {"same teacher"} else found


def figures_of(
    found: Measured, band: Measured, at_start: NDArray[np.bool_], precision: Measured | None = None
) -> list[Figure]:
    """One figure for each measure and part; arguments are float64 [n] for each measure, NaN where a row is silent."""
    figures = []
    for name, values in found.items():
        for part, rows in (("start", at_start), ("rest", ~at_start)):
            known = values[rows & ~np.isnan(values)]
            if not known.size:
                continue
            noise = _mean(band, name, rows)
            other = None if precision is None else _mean(precision, name, rows)
            figures.append(
                Figure(
                    measure=name,
                    part=part,
                    rows=known.size,
                    mean=float(known.mean()),
                    median=float(np.median(known)),
                    p99=float(np.quantile(known, 0.99)),
                    band=noise,
                    limit=_limit(name, known, noise),
                    precision=other,
                    precision_limit=None if other is None else _limit(name, known, max(noise, other)),
                )
            )
    return figures


def _limit(name: str, known: Floats, noise: float) -> float:
    if name == "score":
        # Not a distance: its mean is 0 for the right teacher, whatever the noise.
        spread = known.std(ddof=1) / np.sqrt(known.size) if known.size > 1 else np.inf
        return float(SCORE_ERRORS * spread)
    return FACTOR * max(noise, FLOORS[name])


def _mean(measured: Mapping[str, Floats], name: str, rows: NDArray[np.bool_]) -> float:
    values = measured[name][rows] if name in measured else np.zeros(0)
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else 0.0
