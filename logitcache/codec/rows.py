"""SparseTargets <-> planes of non-negative integers. Transforms only: the container compresses the planes.

Each codec is a frozen dataclass that round-trips through JSON and raises when a value is out of its range; nothing
is ever masked or wrapped. FORMAT.md defines every plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import columns, slots
from logitcache.codec.frequency import FrequencyRanks
from logitcache.errors import DamagedCacheError, FormatVersionError, TargetsError
from logitcache.targets import SUM_TOLERANCE, SparseTargets

Planes = dict[str, NDArray[np.int64]]
_SIDE = ("label_logprob", "entropy")
# Entries whose log-probabilities round to one step keep the teacher's order: each slot is lighter by this much.
SLOT_NATS = 2.0**-22


class RowCodec(Protocol):
    """Encodes N rows into planes and back."""

    def encode(self, targets: SparseTargets, ranks: FrequencyRanks) -> Planes:
        """Planes of non-negative integers. Raises TargetsError when a value cannot be stored."""

    def decode(self, planes: Planes, num_rows: int, ranks: FrequencyRanks) -> SparseTargets:
        """The rows back. Raises DamagedCacheError when the planes contradict each other."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored in plan and manifest."""


@dataclass(frozen=True)
class CountsCodec:
    """Exact codec of `sample:N` rows: ids in rank order as deltas, and how often each was drawn.

    The counts of a row sum to `draws`, which tells where it ends; row lengths are not stored.
    Planes: `ids` (rank deltas, slot-major), `counts` (count - 1, slot-major), `label_logprob`, `entropy`.
    """

    draws: int

    def encode(self, targets: SparseTargets, ranks: FrequencyRanks) -> Planes:
        if not targets.unbiased:
            raise TargetsError("the counts codec stores sampled targets; these hold exact probabilities")
        targets.check_vocabulary(ranks.vocab_size)
        mask, ids, weights = slots.grids(targets, ranks.encode(targets.ids))
        counts = np.rint(weights.astype(np.float64) * self.draws).astype(np.int64)
        off = mask & ((np.abs(weights * self.draws - counts) > 1e-2) | (counts < 1))
        off_rows = off.any(0) | (counts.sum(0) != self.draws)
        if off_rows.any():
            raise TargetsError(f"row {int(np.argmax(off_rows))}'s weights are not counts among {self.draws} draws")
        deltas = np.diff(ranks.encode(ids), axis=0, prepend=-1) - 1
        return {"ids": deltas[mask], "counts": counts[mask] - 1, **_side_columns(targets)}

    def decode(self, planes: Planes, num_rows: int, ranks: FrequencyRanks) -> SparseTargets:
        _check_planes(planes, ("counts", "ids", *_SIDE), _SIDE, num_rows)
        lengths, counts = self._walk_counts(planes["counts"], num_rows)
        _check_lengths(lengths, planes["ids"].size)
        mask = slots.slot_mask(lengths)
        ids = ranks.decode(np.cumsum(slots.spread(planes["ids"] + 1, mask), axis=0)[mask] - 1)
        weights = (slots.spread(counts, mask) / np.float64(self.draws)).astype(np.float32)
        offsets, flat_ids, flat_weights = slots.to_rows(slots.spread(ids, mask), weights, mask)
        return SparseTargets(offsets, flat_ids, flat_weights, unbiased=True, **_decode_side_columns(planes))

    def _walk_counts(self, plane: NDArray[np.int64], num_rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row lengths from the counts: slot by slot, a row goes on until its counts reach `draws`."""
        left = np.full(num_rows, self.draws, dtype=np.int64)
        lengths = np.zeros(num_rows, dtype=np.int64)
        active, position = np.arange(num_rows), 0
        while active.size:
            taken = plane[position : position + active.size] + 1
            if taken.size != active.size:
                raise DamagedCacheError("the counts end before every row has its draws")
            position += active.size
            left[active] -= taken
            lengths[active] += 1
            active = active[left[active] > 0]
        if position != plane.size or (left < 0).any():
            raise DamagedCacheError(f"a row's counts do not sum to {self.draws} draws")
        return lengths, plane + 1

    def to_dict(self) -> dict[str, Any]:
        return {"name": "counts", **asdict(self)}


@dataclass(frozen=True)
class LogprobCodec:
    """Codec of exact probabilities: ids in order of falling probability, log-probabilities as rising steps.

    Decoded weights are scaled so that a row sums to 1 - tail mass; the steps only settle their proportions.
    Planes: `lengths`, `ids` (ranks, slot-major), `logprobs` (step differences, slot-major), `tail`,
    `label_logprob`, `entropy`.
    """

    steps_per_nat: int = 16

    def encode(self, targets: SparseTargets, ranks: FrequencyRanks) -> Planes:
        if targets.unbiased:
            raise TargetsError("the log-probability codec stores exact probabilities; these targets are sampled")
        targets.check_vocabulary(ranks.vocab_size)
        if (targets.weights <= 0).any():
            entry = int(np.argmax(targets.weights <= 0))
            raise TargetsError(f"row {int(targets.row_index()[entry])} stores an entry of weight 0; leave it out")
        _check_sums(targets)
        mask, ids, weights = slots.grids(targets, -targets.weights)
        steps = np.zeros(mask.shape, dtype=np.int64)
        # A probability may exceed 1 by rounding; its logarithm must not.
        nats = np.maximum(0.0, -np.log(weights[mask].astype(np.float64)))
        steps[mask] = np.rint(nats * self.steps_per_nat).astype(np.int64)
        rises = np.diff(steps, axis=0, prepend=0)
        return {
            "lengths": targets.row_lengths,
            "ids": ranks.encode(ids[mask]),
            "logprobs": rises[mask],
            "tail": columns.encode_tail(targets.tail_mass, targets.row_sums()),
            **_side_columns(targets),
        }

    def decode(self, planes: Planes, num_rows: int, ranks: FrequencyRanks) -> SparseTargets:
        _check_planes(planes, ("ids", "logprobs", "lengths", "tail", *_SIDE), ("lengths", "tail", *_SIDE), num_rows)
        lengths = planes["lengths"]
        _check_lengths(lengths, planes["ids"].size)
        _check_lengths(lengths, planes["logprobs"].size)
        mask = slots.slot_mask(lengths)
        ids = slots.spread(ranks.decode(planes["ids"]), mask)
        steps = np.cumsum(slots.spread(planes["logprobs"], mask), axis=0)
        tail, head = columns.decode_tail(planes["tail"])
        weights = np.where(mask, np.exp(-steps / self.steps_per_nat - SLOT_NATS * np.arange(len(steps))[:, None]), 0.0)
        sums = weights.sum(0)
        weights *= np.divide(head, sums, out=np.zeros_like(sums), where=sums > 0)
        offsets, flat_ids, flat_weights = slots.to_rows(ids, weights.astype(np.float32), mask)
        return SparseTargets(
            offsets, flat_ids, flat_weights, tail_mass=tail, unbiased=False, **_decode_side_columns(planes)
        )

    def to_dict(self) -> dict[str, Any]:
        return {"name": "logprob", **asdict(self)}


def codec_from_dict(fields: dict[str, Any]) -> RowCodec:
    """Build the codec a manifest names. Raises FormatVersionError for a name this version does not know."""
    kinds: dict[str, Any] = {"counts": CountsCodec, "logprob": LogprobCodec}
    parameters = {key: value for key, value in fields.items() if key != "name"}
    try:
        codec: RowCodec = kinds[fields["name"]](**parameters)
        if not all(type(value) is int and 1 <= value <= slots.MAX_LENGTH for value in parameters.values()):
            raise TypeError("a parameter is out of range")
    except (KeyError, TypeError) as error:
        raise FormatVersionError(f"codec {fields} is unknown to this version; upgrade logitcache") from error
    return codec


def _check_planes(planes: Planes, names: Sequence[str], of_rows: Sequence[str], num_rows: int) -> None:
    """Raise DamagedCacheError unless `names` are there and those `of_rows` hold a number for each row."""
    absent = [name for name in names if name not in planes]
    if absent:
        raise DamagedCacheError(f"there is no plane {absent[0]!r}")
    for name in of_rows:
        if planes[name].size != num_rows:
            raise DamagedCacheError(f"plane {name!r} has {planes[name].size} numbers for {num_rows} rows")


def _check_lengths(lengths: NDArray[np.int64], num_entries: int) -> None:
    """Raise DamagedCacheError, before anything of that size is allocated, unless lengths add up to the entries."""
    if lengths.max(initial=0) > slots.MAX_LENGTH:
        raise DamagedCacheError(f"a row of {int(lengths.max())} entries is longer than the format allows")
    if int(lengths.sum()) != num_entries:
        raise DamagedCacheError("the planes disagree about the number of entries")


def _check_sums(targets: SparseTargets) -> None:
    """A decoded row sums to 1 - tail mass; refuse one that did not."""
    total = targets.row_sums() + targets.tail_mass
    off = (targets.row_lengths > 0) & (np.abs(total - 1) > SUM_TOLERANCE)
    if off.any():
        row = int(np.argmax(off))
        raise TargetsError(f"row {row}'s probabilities and tail mass sum to {total[row]:.6f}; store the whole tail")


def _side_columns(targets: SparseTargets) -> Planes:
    return {
        "label_logprob": columns.encode_logprob(targets.label_logprob),
        "entropy": columns.encode_entropy(targets.entropy),
    }


def _decode_side_columns(planes: Planes) -> dict[str, NDArray[np.float32]]:
    return {
        "label_logprob": columns.decode_logprob(planes["label_logprob"]),
        "entropy": columns.decode_entropy(planes["entropy"]),
    }
