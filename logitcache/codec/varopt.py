"""The values of `varopt` rows: an exact head, and a tail whose entries all weigh the same.

A row's weights sum to 1, so its largest head weight is what the others leave, and the tail's weight is the stored rest
divided by the number of tail entries. Head weights and rest are rounded at random on a `ProbabilityGrid`, each with the
right expected value; the largest head weight then has it too. Where the others, all rounded up, could leave nothing for
the largest, the row uses a finer grid.

Legend: N rows, nnz entries, a row with h head and m tail entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from logitcache.codec.codebook import Planes
from logitcache.codec.grid import ProbabilityGrid
from logitcache.codec.memory import FRESH, Memory
from logitcache.codec.values import Dither, Ints, Weights
from logitcache.errors import DamagedCacheError, TargetsError
from logitcache.targets import SUM_TOLERANCE, SparseTargets

TAIL, LARGEST, HEAD = 0, 1, 2
# Each precision divides the steps by 16; the last one is fine enough for 65,535 equal heads.
PRECISIONS = 6
SAME = 1e-5
# Sums of float64 numbers may be off by this much.
ROUNDING = 1e-9


@dataclass(frozen=True)
class HeadTailValues:
    """Codes of entries: 0 tail, 1 the row's largest head weight, 2 + level any other head weight.

    Planes of rows: `rest`, 1 + level of the tail's mass (0 where it is 0 or 1), and `precision`, p: fineness 16^p.
    """

    root_steps: int = 64

    name: ClassVar[str] = "head-tail"
    plane: ClassVar[str] = "levels"
    of_rows: ClassVar[tuple[str, ...]] = ("rest", "precision")
    unbiased: ClassVar[bool] = True

    def encode(self, targets: SparseTargets, dither: Dither) -> tuple[Ints, Planes]:
        parts = _Parts.of(targets)
        uniforms, of_rests = dither(targets.ids.size), dither(len(targets))
        codes = np.where(parts.head, HEAD, TAIL).astype(np.int64)
        codes[parts.largest] = LARGEST
        precision, rest = self._precisions(parts), np.zeros(len(targets), dtype=np.int64)
        weights = targets.weights.astype(np.float64)
        for step in np.unique(precision):
            grid = self._grid(step)
            entries = (codes == HEAD) & (precision[parts.rows] == step)
            codes[entries] += grid.rounded(weights[entries], uniforms[entries])
            mixed = parts.mixed & (precision == step)
            rest[mixed] = 1 + grid.rounded(parts.rest[mixed], of_rests[mixed])
        return codes, {"rest": rest, "precision": precision}

    def _precisions(self, parts: _Parts) -> Ints:
        """The coarsest precision of each row that leaves something for its largest head weight."""
        chosen = np.full(parts.rest.size, PRECISIONS - 1, dtype=np.int64)
        undecided = np.ones(chosen.size, dtype=bool)
        for step in range(PRECISIONS - 1):
            grid = self._grid(step)
            entries, mixed = parts.others & undecided[parts.rows], parts.mixed & undecided
            most = _per_row(parts.rows[entries], grid.value(grid.below(parts.weights[entries]) + 1), chosen.size)
            most[mixed] += grid.value(grid.below(parts.rest[mixed]) + 1)
            enough = undecided & (most < 1 - ROUNDING)
            chosen[enough] = step
            undecided &= ~enough
            if not undecided.any():
                break
        return chosen

    def decode(self, codes: NDArray[Any], rows: Planes, offsets: Ints, memory: Memory = FRESH) -> Weights:
        lengths = np.diff(offsets)
        row_of = np.repeat(np.arange(lengths.size), lengths)
        head, rest = codes >= HEAD, rows["rest"] > 0
        num_tail = np.bincount(row_of[codes == TAIL], minlength=lengths.size)
        num_largest = np.bincount(row_of[codes == LARGEST], minlength=lengths.size)
        whole = num_largest == 0
        if (rows["precision"] >= PRECISIONS).any() or (num_largest > 1).any():
            raise DamagedCacheError("a row's largest weight or its precision is not what the format allows")
        if whole[row_of[head]].any() or (rest != ((num_tail > 0) & ~whole)).any():
            raise DamagedCacheError("a row's head and tail contradict each other")
        weights, mass = np.zeros(codes.size), (whole & (num_tail > 0)).astype(np.float64)
        for step in np.unique(rows["precision"]):
            grid = self._grid(int(step))
            highest = int(grid.nearest(np.ones(1))[0]) + 1
            entries = head & (rows["precision"][row_of] == step)
            mixed = rest & (rows["precision"] == step)
            if max(int(codes[entries].max(initial=0)), int(rows["rest"][mixed].max(initial=0))) > highest + HEAD:
                raise DamagedCacheError("a stored weight is over 1")
            weights[entries] = grid.value(codes[entries] - HEAD)
            mass[mixed] = grid.value(rows["rest"][mixed] - 1)
        left = 1 - mass - _per_row(row_of, weights, lengths.size)
        if (left[~whole] <= 0).any():
            raise DamagedCacheError("a row's weights sum to more than 1")
        weights[codes == LARGEST] = left[row_of[codes == LARGEST]]
        threshold = (mass / np.maximum(num_tail, 1)).astype(np.float32)
        stored = weights.astype(np.float32)
        stored[codes == TAIL] = threshold[row_of[codes == TAIL]]
        return Weights(stored, threshold=threshold)

    def _grid(self, precision: int) -> ProbabilityGrid:
        return ProbabilityGrid(self.root_steps, 16 ** int(precision))


@dataclass(frozen=True, eq=False)
class _Parts:
    """A varopt row taken apart.

    Args:
        rows: int64 [nnz], each entry's row.
        weights: float64 [nnz].
        head, others: bool [nnz], exact entries, and those of them that are not their row's largest.
        largest: int64, one entry of each row that has a head.
        rest: float64 [N], mass of the tail entries.
        mixed: bool [N], rows with head and tail.
    """

    rows: Ints
    weights: NDArray[np.float64]
    head: NDArray[np.bool_]
    others: NDArray[np.bool_]
    largest: Ints
    rest: NDArray[np.float64]
    mixed: NDArray[np.bool_]

    @classmethod
    def of(cls, targets: SparseTargets) -> _Parts:
        """Raises TargetsError when a row is not of this form."""
        rows, count = targets.row_index(), len(targets)
        weights, threshold = targets.weights.astype(np.float64), targets.threshold.astype(np.float64)[rows]
        # A head weight may lie below the threshold, where it was rounded at random before.
        head = np.abs(weights - threshold) > SAME * threshold
        total = _per_row(rows, weights, count)
        bad = (targets.row_lengths > 0) & ~(np.abs(total - 1) <= SUM_TOLERANCE)
        bad[rows[weights <= 0]] = True
        if bad.any():
            raise TargetsError(f"row {int(np.argmax(bad))} is no varopt row: its weights are positive and sum to 1")
        order = np.lexsort((np.where(head, -weights, 0), rows))[targets.offsets[:-1][targets.row_lengths > 0]]
        largest = order[head[order]]
        others = head.copy()
        others[largest] = False
        rest = _per_row(rows, np.where(head, 0, weights), count)
        has_head = _per_row(rows, head, count) > 0
        return cls(rows, weights, head, others, largest, rest, has_head & (rest > 0))


def _per_row(rows: Ints, values: NDArray[Any], count: int) -> NDArray[np.float64]:
    """float64 [count]: the sum of each row's values."""
    return np.bincount(rows, values, minlength=count).astype(np.float64)
