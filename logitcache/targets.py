"""SparseTargets: the one value that flows through the house, and its padded view for a device.

Legend: N rows (token positions), nnz stored entries over all rows, K longest row.
This module never imports torch at import time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from logitcache.errors import TargetsError

if TYPE_CHECKING:
    import torch

# Probabilities arrive in float32 after quantisation; a row may exceed 1 by rounding, not by more.
SUM_TOLERANCE = 1e-3
# The fields that hold one number for each row.
COLUMNS = ("tail_mass", "label_logprob", "entropy", "threshold")


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Sparse teacher distributions of N token positions in compressed-sparse-row form.

    Row n's entries are `ids[offsets[n]:offsets[n+1]]`, ascending and unique, with `weights` alike.

    Args:
        offsets: int64 [N+1].
        ids: int64 [nnz], token ids.
        weights: float32 [nnz]. `unbiased=False`: the teacher's probability p(id). `unbiased=True`: E[weight] = p(id).
        tail_mass: float32 [N], 1 - sum(weights of the row); 0 for unbiased selections. Computed when None.
        label_logprob: float32 [N], teacher log p(next token) in nats; NaN where there is no next token.
        entropy: float32 [N], entropy of the full distribution in nats; NaN where unknown.
        threshold: float32 [N]; entries with weight > threshold are exact probabilities. Default: 0 (all of
            them) for biased targets, inf (none) for unbiased ones; `varopt:K` rows have one in between.
        unbiased: whether E[weights] equals the teacher's distribution.

    Raises:
        TargetsError: an invariant is broken; the message names the first bad row.
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    tail_mass: NDArray[np.float32]
    label_logprob: NDArray[np.float32]
    entropy: NDArray[np.float32]
    threshold: NDArray[np.float32]
    unbiased: bool

    def __init__(
        self,
        offsets: ArrayLike,
        ids: ArrayLike,
        weights: ArrayLike,
        tail_mass: ArrayLike | None = None,
        label_logprob: ArrayLike | None = None,
        entropy: ArrayLike | None = None,
        threshold: ArrayLike | None = None,
        unbiased: bool = False,
    ) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("offsets", _integers("offsets", offsets))
        put("ids", _integers("ids", ids))
        put("weights", np.ascontiguousarray(weights, dtype=np.float32))
        put("unbiased", bool(unbiased))
        self._check_offsets()
        count = len(self)
        self._check_entries()
        if tail_mass is None:
            tail_mass = np.zeros(count) if unbiased else np.maximum(0.0, 1.0 - self.row_sums())
        put("tail_mass", _column("tail_mass", tail_mass, count, 0.0))
        put("label_logprob", _column("label_logprob", label_logprob, count, np.nan))
        put("entropy", _column("entropy", entropy, count, np.nan))
        put("threshold", _column("threshold", threshold, count, np.inf if unbiased else 0.0))
        self._check_mass()

    def __len__(self) -> int:
        return self.offsets.size - 1

    def __repr__(self) -> str:
        return f"SparseTargets({len(self)} rows, {self.ids.size} entries, unbiased={self.unbiased})"

    @property
    def row_lengths(self) -> NDArray[np.int64]:
        """int64 [N]: stored entries of each row."""
        return np.diff(self.offsets)

    def row_index(self) -> NDArray[np.int64]:
        """int64 [nnz]: the row each entry belongs to."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.row_lengths)

    def row_sums(self) -> NDArray[np.float64]:
        """float64 [N]: sum of the weights of each row."""
        running = np.concatenate([[0.0], np.cumsum(self.weights, dtype=np.float64)])
        return running[self.offsets[1:]] - running[self.offsets[:-1]]

    def slice(self, start: int, stop: int) -> SparseTargets:
        """Rows [start, stop) as a new SparseTargets (views of the same memory)."""
        if not 0 <= start <= stop <= len(self):
            raise TargetsError(f"rows [{start}, {stop}) are outside these targets, which have {len(self)} rows")
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return _unchecked(
            offsets=self.offsets[start : stop + 1] - first,
            ids=self.ids[first:last],
            weights=self.weights[first:last],
            unbiased=self.unbiased,
            **{name: getattr(self, name)[start:stop] for name in COLUMNS},
        )

    def take(self, rows: ArrayLike) -> SparseTargets:
        """The rows of these numbers, int64 [M], in that order; a number may come several times."""
        picked = _integers("rows", rows)
        if picked.size and not 0 <= int(picked.min()) <= int(picked.max()) < len(self):
            raise TargetsError(f"rows outside these targets were asked for, which have {len(self)} rows")
        lengths = self.row_lengths[picked]
        offsets = offsets_of(lengths)
        entries = np.arange(offsets[-1]) + np.repeat(self.offsets[picked] - offsets[:-1], lengths)
        return _unchecked(
            offsets=offsets,
            ids=self.ids[entries],
            weights=self.weights[entries],
            unbiased=self.unbiased,
            **{name: getattr(self, name)[picked] for name in COLUMNS},
        )

    def spread(self, places: NDArray[np.bool_]) -> SparseTargets:
        """These rows, in order, at the True places of a mask bool [M], and at the others rows that say nothing.

        Raises TargetsError unless the mask has a True place for each row.
        """
        if int(places.sum()) != len(self):
            raise TargetsError(f"{len(self)} rows cannot stand at {int(places.sum())} places; give one for each")
        lengths = np.zeros(places.size, dtype=np.int64)
        lengths[places] = self.row_lengths
        columns = {}
        for name, nothing in empty_row(self.unbiased).items():
            columns[name] = np.full(places.size, nothing, dtype=np.float32)
            columns[name][places] = getattr(self, name)
        return _unchecked(
            offsets=offsets_of(lengths), ids=self.ids, weights=self.weights, unbiased=self.unbiased, **columns
        )

    def with_columns(self, label_logprob: ArrayLike, entropy: ArrayLike) -> SparseTargets:
        """The same rows with these label_logprob and entropy columns, float32 [N], nats."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["label_logprob"] = _column("label_logprob", label_logprob, len(self), np.nan)
        fields["entropy"] = _column("entropy", entropy, len(self), np.nan)
        return _unchecked(**fields)

    @staticmethod
    def concatenate(parts: Sequence[SparseTargets]) -> SparseTargets:
        """Rows of all parts in order. The parts must agree on `unbiased`."""
        if not parts:
            raise TargetsError("there is nothing to concatenate; pass at least one SparseTargets")
        if len({part.unbiased for part in parts}) > 1:
            raise TargetsError("biased and unbiased targets cannot be concatenated; keep them in separate caches")
        return _unchecked(
            offsets=offsets_of(np.concatenate([part.row_lengths for part in parts])),
            ids=np.concatenate([part.ids for part in parts]),
            weights=np.concatenate([part.weights for part in parts]),
            unbiased=parts[0].unbiased,
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS},
        )

    @property
    def has_exact_head(self) -> bool:
        """Whether every row tells its exact entries from its sampled ones: False for `sample:N`."""
        return not (self.unbiased and bool((np.isinf(self.threshold) & (self.row_lengths > 0)).any()))

    def exact_head(self) -> SparseTargets:
        """Only the exact entries (weight > threshold), as biased targets with the rest as tail mass.

        So one `varopt:K` cache serves objectives that want samples and those that want probabilities. Biased targets
        are exact already and come back as they are.

        Raises:
            TargetsError: a row holds samples without a threshold.
        """
        if not self.unbiased:
            return self
        if not self.has_exact_head:
            row = int(np.argmax(np.isinf(self.threshold) & (self.row_lengths > 0)))
            raise TargetsError(
                f"row {row} holds samples of which none is exact; dump a cache with --select varopt:K, top-k:K or "
                "top-p:P:K"
            )
        rows = self.row_index()
        exact = self.weights > self.threshold[rows]
        # Not 1 - head, which would lose the tail of a confident row.
        tail = np.bincount(rows[~exact], self.weights[~exact], minlength=len(self))
        return SparseTargets(
            offsets_of(exact)[self.offsets],
            self.ids[exact],
            self.weights[exact],
            tail_mass=np.minimum(tail, 1),
            label_logprob=self.label_logprob,
            entropy=self.entropy,
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise TargetsError, naming the row, if an id does not fit in `vocab_size`."""
        check_vocabulary(self.offsets, self.ids, vocab_size)

    def padded(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """ids int64 [N, K] padded with -1 and weights float32 [N, K] padded with 0; K >= 1."""
        lengths = self.row_lengths
        width = max(1, int(lengths.max(initial=0)))
        filled = np.arange(width) < lengths[:, None]
        ids = np.full(filled.shape, -1, dtype=np.int64)
        weights = np.zeros(filled.shape, dtype=np.float32)
        ids[filled], weights[filled] = self.ids, self.weights
        return ids, weights

    def to_device(self, device: torch.device | str = "cpu") -> DeviceTargets:
        """The padded view as torch tensors on `device`."""
        import torch

        def tensor(array: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        ids, weights = self.padded()
        columns = {name: tensor(getattr(self, name)) for name in COLUMNS}
        return DeviceTargets(
            tensor(ids), tensor(weights), **columns, unbiased=self.unbiased, has_exact_head=self.has_exact_head
        )

    def _check_offsets(self) -> None:
        if self.offsets.ndim != 1 or self.offsets.size == 0 or self.offsets[0] != 0:
            raise TargetsError("offsets must be one-dimensional, hold N + 1 numbers and begin with 0")
        drops = np.flatnonzero(np.diff(self.offsets) < 0)
        if drops.size:
            raise TargetsError(f"offsets fall after row {int(drops[0])}; each must be at least the one before")
        for name in ("ids", "weights"):
            if getattr(self, name).shape != (self.offsets[-1],):
                raise TargetsError(
                    f"{name} has shape {getattr(self, name).shape}, but offsets end at {int(self.offsets[-1])}; "
                    "there must be one entry for each"
                )

    def _check_entries(self) -> None:
        if not self.ids.size:
            return
        steps = np.diff(self.ids)
        same_row = np.ones(steps.size, dtype=bool)
        starts = self.offsets[1:-1]
        same_row[starts[(starts > 0) & (starts < self.ids.size)] - 1] = False
        for bad, what in (
            (self.ids < 0, "a negative token id"),
            (~np.isfinite(self.weights), "a weight that is not finite"),
            (self.weights < 0, "a negative weight"),
            (np.append(False, same_row & (steps <= 0)), "ids that are not ascending and unique"),
        ):
            if bad.any():
                entry = int(np.argmax(bad))
                raise TargetsError(
                    f"row {_row_of(self.offsets, entry)} has {what} (entry {entry}, id {int(self.ids[entry])})"
                )

    def _check_mass(self) -> None:
        low = ~((self.tail_mass >= 0) & (self.tail_mass <= 1))
        if low.any():
            row = int(np.argmax(low))
            raise TargetsError(f"row {row} has tail mass {self.tail_mass[row]}; it must lie in [0, 1]")
        if self.unbiased:
            return
        total = self.row_sums() + self.tail_mass
        if (total > 1 + SUM_TOLERANCE).any():
            row = int(np.argmax(total > 1 + SUM_TOLERANCE))
            raise TargetsError(f"row {row}'s probabilities and tail mass sum to {total[row]:.6f}, which is over 1")


@dataclass(frozen=True)
class DeviceTargets:
    """The padded view of SparseTargets as torch tensors: what a loss consumes.

    Args:
        ids: int64 [N, K], ascending in a row, padded with -1.
        weights: float32 [N, K], padded with 0.
        tail_mass, label_logprob, entropy, threshold: float32 [N], as in SparseTargets.
        unbiased: as in SparseTargets.
        has_exact_head: as in SparseTargets; None where nobody looked, as looking would stall a GPU.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    tail_mass: torch.Tensor
    label_logprob: torch.Tensor
    entropy: torch.Tensor
    threshold: torch.Tensor
    unbiased: bool
    has_exact_head: bool | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def slice(self, start: int, stop: int) -> DeviceTargets:
        """Rows [start, stop), as views of the same memory."""
        names = ("ids", "weights", *COLUMNS)
        return replace(self, **{name: getattr(self, name)[start:stop] for name in names})

    def exact_head(self) -> DeviceTargets:
        """As `SparseTargets.exact_head`, without a look at the values: rows without a threshold get NaN weights."""
        import torch

        if not self.unbiased:
            return self
        stored_NK, unknown_N1 = self.ids >= 0, self.threshold.isinf().unsqueeze(1)
        exact_NK = stored_NK & ((self.weights > self.threshold.unsqueeze(1)) | unknown_N1)
        weights_NK = torch.where(exact_NK, self.weights.masked_fill(unknown_N1, torch.nan), 0)
        tail_N = torch.where(stored_NK & ~exact_NK, self.weights, 0).sum(1, dtype=torch.float64).clamp(max=1)
        # Padding stays at the end, and the ids in order.
        order_NK = (~exact_NK).to(torch.uint8).argsort(dim=1, stable=True)
        return replace(
            self,
            ids=self.ids.masked_fill(~exact_NK, -1).gather(1, order_NK),
            weights=weights_NK.gather(1, order_NK),
            tail_mass=tail_N.to(self.weights.dtype),
            threshold=torch.zeros_like(self.threshold),
            unbiased=False,
        )


def empty_row(unbiased: bool) -> dict[str, float]:
    """The columns of a row that has no entries and says nothing."""
    nothing = {"tail_mass": float(not unbiased), "threshold": np.inf if unbiased else 0.0}
    return {name: nothing.get(name, np.nan) for name in COLUMNS}


def offsets_of(lengths: ArrayLike) -> NDArray[np.int64]:
    """int64 [N + 1]: where rows of these lengths [N] begin and end; of a mask, how many it holds before each place."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def check_vocabulary(offsets: NDArray[np.int64], ids: NDArray[np.int64], vocab_size: int) -> None:
    """Raise TargetsError, naming the row, if an id of rows in CSR form does not fit in `vocab_size`."""
    if ids.size and int(ids.max()) >= vocab_size:
        entry = int(np.argmax(ids >= vocab_size))
        raise TargetsError(
            f"row {_row_of(offsets, entry)} holds token id {int(ids[entry])}, but the vocabulary has {vocab_size} ids; "
            "use the tokenizer and model these targets were made for"
        )


def _row_of(offsets: NDArray[np.int64], entry: int) -> int:
    return int(np.searchsorted(offsets, entry, side="right")) - 1


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise TargetsError(f"{name} must be integers, not {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _column(name: str, values: ArrayLike | None, count: int, default: float) -> NDArray[np.float32]:
    array = np.full(count, default, dtype=np.float32) if values is None else np.ascontiguousarray(values, np.float32)
    if array.shape != (count,):
        raise TargetsError(f"{name} has shape {array.shape}, but there are {count} rows")
    return array


def from_codec(
    offsets: NDArray[np.int64],
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    unbiased: bool,
    **columns: NDArray[np.float32] | None,
) -> SparseTargets:
    """Targets of arrays that a codec has checked; absent columns get their defaults, as in `SparseTargets`."""
    defaults = {"tail_mass": 0.0, "label_logprob": np.nan, "entropy": np.nan, "threshold": np.inf if unbiased else 0.0}
    count = offsets.size - 1
    fields = {name: _column(name, columns.get(name), count, default) for name, default in defaults.items()}
    return _unchecked(offsets=offsets, ids=ids, weights=weights, unbiased=unbiased, **fields)


def _unchecked(**fields: Any) -> SparseTargets:
    """Build from parts of targets that were validated already."""
    targets = object.__new__(SparseTargets)
    for name, value in fields.items():
        object.__setattr__(targets, name, value)
    return targets
