"""Weights <-> small integers, one for each entry, and what a row needs besides.

Every coder works on rows in their final order and knows nothing of how planes are laid out.

Legend: N rows, nnz entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from logitcache.codec import columns
from logitcache.codec.codebook import Planes
from logitcache.codec.grid import ProbabilityGrid
from logitcache.codec.memory import FRESH, Memory
from logitcache.errors import DamagedCacheError, TargetsError
from logitcache.targets import SUM_TOLERANCE, SparseTargets

Ints = NDArray[np.int64]
MOST_WEIGHT = 1e6
# A row of `sample:N` holds count / N; float32 gives the count back to better than this.
COUNT_TOLERANCE = 1e-2
# Gives n uniform numbers in [0, 1), float64; the same ones whenever the same chunk is encoded.
Dither = Callable[[int], NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Weights:
    """What a value coder gives back: float32 weights [nnz], tail_mass [N] and threshold [N]."""

    weights: NDArray[np.float32]
    tail_mass: NDArray[np.float32] | None = None
    threshold: NDArray[np.float32] | None = None


class ValueCodec(Protocol):
    """Codes the weights of one kind of targets; one whose `plane` is "" stores no entries at all."""

    name: ClassVar[str]
    plane: ClassVar[str]
    of_rows: ClassVar[tuple[str, ...]]
    unbiased: ClassVar[bool]

    def encode(self, targets: SparseTargets, dither: Dither) -> tuple[Ints, Planes]:
        """Codes int64 [nnz] and the planes of rows. Raises TargetsError."""

    def decode(self, codes: NDArray[Any], rows: Planes, offsets: Ints, memory: Memory = FRESH) -> Weights:
        """The inverse. Raises DamagedCacheError."""


@dataclass(frozen=True)
class CountValues:
    """Exact: how often each id of a `sample:N` row was drawn, minus 1. A row's counts sum to `draws`."""

    draws: int

    name: ClassVar[str] = "counts"
    plane: ClassVar[str] = "counts"
    of_rows: ClassVar[tuple[str, ...]] = ()
    unbiased: ClassVar[bool] = True

    def encode(self, targets: SparseTargets, dither: Dither) -> tuple[Ints, Planes]:
        return counts_of(targets, self.draws) - 1, {}

    def decode(self, codes: NDArray[Any], rows: Planes, offsets: Ints, memory: Memory = FRESH) -> Weights:
        if codes.size and int(codes.max()) >= self.draws:
            raise DamagedCacheError(f"a count is over {self.draws}")
        # A row's sum fits into 32 bits (65,535 counts below 65,536), so that differences are right where the whole
        # sum has wrapped around.
        running = memory.scratch("running", codes.size + 1, np.uint32)
        running[0] = 0
        np.copyto(running[1:], codes, casting="unsafe")
        at_rows = np.cumsum(running, dtype=np.uint32, out=running)[offsets]
        if (np.diff(at_rows) + np.diff(offsets) != self.draws).any():
            raise DamagedCacheError(f"a row's counts do not sum to {self.draws} draws")
        weights = memory.kept("weights", codes.size, np.float32)
        np.copyto(weights, codes, casting="unsafe")
        weights += 1
        weights /= np.float32(self.draws)
        return Weights(weights)


@dataclass(frozen=True)
class ProbabilityValues:
    """Levels of exact probabilities on a `ProbabilityGrid`, above the row's lowest one, and the tail mass.

    Decoded weights are scaled so that a row sums to 1 - tail mass; the levels only settle their proportions.
    """

    root_steps: int = 256

    name: ClassVar[str] = "probabilities"
    plane: ClassVar[str] = "levels"
    of_rows: ClassVar[tuple[str, ...]] = ("least", "tail")
    unbiased: ClassVar[bool] = False

    def encode(self, targets: SparseTargets, dither: Dither) -> tuple[Ints, Planes]:
        _refuse_zeros(targets)
        total = targets.row_sums() + targets.tail_mass
        off = (targets.row_lengths > 0) & (np.abs(total - 1) > SUM_TOLERANCE)
        if off.any():
            row = int(np.argmax(off))
            raise TargetsError(f"row {row}'s probabilities and tail mass sum to {total[row]:.6f}; store the whole tail")
        levels = self._grid.nearest(np.minimum(targets.weights.astype(np.float64), 1))
        least = np.zeros(len(targets), dtype=np.int64)
        filled = targets.row_lengths > 0
        if levels.size:
            least[filled] = np.minimum.reduceat(levels, targets.offsets[:-1][filled])
        tail = columns.encode_tail(targets.tail_mass, targets.row_sums())
        return _with_rows(np.subtract, levels, least, targets.offsets), {"least": least, "tail": tail}

    def decode(self, codes: NDArray[Any], rows: Planes, offsets: Ints, memory: Memory = FRESH) -> Weights:
        tail, head = columns.decode_tail(rows["tail"])
        highest = self._value_of_level.size
        if max(int(codes.max(initial=0)), int(rows["least"].max(initial=0))) >= highest:
            raise DamagedCacheError("a stored probability is over 1")
        # Narrow numbers add up fastest; the type of their sums is the one that indexes without being converted.
        levels = memory.scratch("levels", codes.size, np.intp)
        _with_rows(np.add, codes, rows["least"].astype(np.uint32), offsets, out=levels, dtype=np.uint32)
        if int(levels.max(initial=0)) >= highest:
            raise DamagedCacheError("a stored probability is over 1")
        exact = memory.scratch("exact", codes.size, np.float64)
        np.take(self._value_of_level, levels, out=exact, mode="clip")
        sums = _sums(exact, offsets)
        scale = np.divide(head, sums, out=np.zeros_like(sums), where=sums > 0)
        _with_rows(np.multiply, exact, scale, offsets, out=exact)
        weights = memory.kept("weights", codes.size, np.float32)
        np.copyto(weights, exact, casting="same_kind")
        return Weights(weights, tail.astype(np.float32))

    @property
    def _grid(self) -> ProbabilityGrid:
        return ProbabilityGrid(self.root_steps)

    @cached_property
    def _value_of_level(self) -> NDArray[np.float64]:
        highest = int(self._grid.nearest(np.ones(1))[0])
        return self._grid.value(np.arange(highest + 1))


@dataclass(frozen=True)
class WeightValues:
    """Levels of any positive unbiased weights, rounded at random so that E[decoded] = weight."""

    root_steps: int = 64

    name: ClassVar[str] = "weights"
    plane: ClassVar[str] = "levels"
    of_rows: ClassVar[tuple[str, ...]] = ()
    unbiased: ClassVar[bool] = True

    def encode(self, targets: SparseTargets, dither: Dither) -> tuple[Ints, Planes]:
        _refuse_zeros(targets)
        if (targets.weights > MOST_WEIGHT).any():
            row = int(targets.row_index()[np.argmax(targets.weights > MOST_WEIGHT)])
            raise TargetsError(f"row {row} has a weight over {MOST_WEIGHT:g}; importance weights must stay below")
        weights = targets.weights.astype(np.float64)
        return self._grid.rounded(weights, dither(weights.size)), {}

    def decode(self, codes: NDArray[Any], rows: Planes, offsets: Ints, memory: Memory = FRESH) -> Weights:
        if int(codes.max(initial=0)) > self._grid.nearest(np.array([4 * MOST_WEIGHT]))[0]:
            raise DamagedCacheError(f"a stored weight is over {MOST_WEIGHT:g}")
        return Weights(self._grid.value(codes).astype(np.float32))

    @property
    def _grid(self) -> ProbabilityGrid:
        return ProbabilityGrid(self.root_steps)


@dataclass(frozen=True)
class NoValues:
    """Nothing: rows without ids, of which only the columns are kept."""

    name: ClassVar[str] = "none"
    plane: ClassVar[str] = ""
    of_rows: ClassVar[tuple[str, ...]] = ()
    unbiased: ClassVar[bool] = False

    def encode(self, targets: SparseTargets, dither: Dither) -> tuple[Ints, Planes]:
        if targets.ids.size:
            raise TargetsError(f"row {int(np.argmax(targets.row_lengths > 0))} has ids, but only columns are stored")
        return np.zeros(0, dtype=np.int64), {}

    def decode(self, codes: NDArray[Any], rows: Planes, offsets: Ints, memory: Memory = FRESH) -> Weights:
        return Weights(np.zeros(0, dtype=np.float32), np.ones(offsets.size - 1, dtype=np.float32))


def counts_of(targets: SparseTargets, draws: int) -> Ints:
    """int64 [nnz]: how often each id of `sample:N` rows was drawn, N = `draws`.

    Raises:
        TargetsError: the weights of a row are not counts among `draws`.
    """
    exact = targets.weights.astype(np.float64) * draws
    counts = np.rint(exact).astype(np.int64)
    off_rows = _sums(counts, targets.offsets) != draws
    off_rows[targets.row_index()[(np.abs(exact - counts) > COUNT_TOLERANCE) | (counts < 1)]] = True
    if off_rows.any():
        raise TargetsError(f"row {int(np.argmax(off_rows))}'s weights are not counts among {draws} draws")
    return counts


def _refuse_zeros(targets: SparseTargets) -> None:
    if (targets.weights <= 0).any():
        entry = int(np.argmax(targets.weights <= 0))
        raise TargetsError(f"row {int(targets.row_index()[entry])} stores an entry of weight 0; leave it out")


def _sums(values: NDArray[Any], offsets: Ints) -> NDArray[Any]:
    """Sum of each row's values; exact for integers, and to rounding of the row itself for floats."""
    lengths = np.diff(offsets)
    if values.dtype.kind != "f":
        running = np.zeros(values.size + 1, dtype=np.int64)
        np.cumsum(values, out=running[1:])
        return running[offsets[1:]] - running[offsets[:-1]]
    if _equal_rows(offsets):
        return values.reshape(lengths.size, -1).sum(1)
    sums = np.zeros(lengths.size, dtype=values.dtype)
    filled = lengths > 0
    if filled.any():
        sums[filled] = np.add.reduceat(values, offsets[:-1][filled])
    return sums


def _with_rows(
    combine: np.ufunc,
    values: NDArray[Any],
    of_rows: NDArray[Any],
    offsets: Ints,
    out: NDArray[Any] | None = None,
    dtype: DTypeLike | None = None,
) -> NDArray[Any]:
    """`combine` each entry's value with that of its row, computed in `dtype`, where given, which must hold them.

    Rows of one length need no copy of the latter.
    """
    if _equal_rows(offsets):
        shape = (len(of_rows), -1)
        into = None if out is None else out.reshape(shape)
        combined: NDArray[Any] = combine(
            values.reshape(shape), of_rows[:, None], out=into, dtype=dtype, casting="unsafe"
        )
        return combined.ravel() if out is None else out
    entries: NDArray[Any] = combine(
        values, np.repeat(of_rows, np.diff(offsets)), out=out, dtype=dtype, casting="unsafe"
    )
    return entries


def _equal_rows(offsets: Ints) -> bool:
    """Whether all rows have the same number of entries, and some."""
    lengths = np.diff(offsets)
    return bool(lengths.size and lengths[0] and (lengths == lengths[0]).all())
