"""SparseTargets <-> planes of non-negative integers. Transforms only: the container compresses the planes.

A codec is a layout (where ids and entries go) and a value coder (what the weights become). It round-trips through JSON
and raises when a value is out of its range; nothing is ever masked or wrapped. FORMAT.md defines every plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import columns
from logitcache.codec.codebook import Codebook, Planes
from logitcache.codec.layouts import LAYOUTS, MAX_LENGTH, Context, check_rows
from logitcache.codec.memory import FRESH, Memory
from logitcache.codec.values import CountValues, Dither, NoValues, ProbabilityValues, ValueCodec, WeightValues
from logitcache.codec.varopt import HeadTailValues
from logitcache.errors import DamagedCacheError, FormatVersionError, TargetsError
from logitcache.targets import SparseTargets, check_vocabulary, from_codec, offsets_of

LayoutName = Literal["fast", "small"]
_SIDE = ("label_logprob", "entropy")
_KINDS: dict[str, Any] = {
    kind.name: kind for kind in (CountValues, ProbabilityValues, WeightValues, HeadTailValues, NoValues)
}
# Below 16 steps the grid of probabilities would be all logarithmic.
PARAMETERS = {"draws": range(1, 65_536), "root_steps": range(16, 65_536)}


@dataclass(frozen=True, eq=False)
class CodedRows:
    """N rows as integers, in their final order.

    In a masked cache `rows` has a plane `counted`, 1 where a row counts and 0 where it is empty and not stored.

    Args:
        offsets: int64 [N + 1].
        ids: int64, or int32 in narrow memory, [nnz]; ascending within a row.
        codes: integers [nnz], what the value coder made of the weights.
        rows: int64 [N] each, the planes of rows.
    """

    offsets: NDArray[np.int64]
    ids: NDArray[Any]
    codes: NDArray[Any]
    rows: Planes

    def __len__(self) -> int:
        return self.offsets.size - 1

    @property
    def counted(self) -> NDArray[np.bool_] | None:
        """bool [N]: whether the row counts; None where all do."""
        return self.rows["counted"] > 0 if "counted" in self.rows else None

    def stored(self) -> CodedRows:
        """The rows that count, without their mask."""
        if self.counted is None:
            return self
        kept = np.flatnonzero(self.counted)
        rows = {name: plane[kept] for name, plane in self.rows.items() if name != "counted"}
        return replace(self, offsets=offsets_of(np.diff(self.offsets)[kept]), rows=rows)

    def spread(self, counted: NDArray[np.bool_] | None) -> CodedRows:
        """The inverse of `stored`, for a mask bool [N] that is True once for each of these rows."""
        if counted is None:
            return self
        lengths, rows = np.zeros(counted.size, dtype=np.int64), {"counted": counted.astype(np.int64)}
        lengths[counted] = np.diff(self.offsets)
        for name, plane in self.rows.items():
            rows[name] = np.zeros(counted.size, dtype=np.int64)
            rows[name][counted] = plane
        return replace(self, offsets=offsets_of(lengths), rows=rows)

    def slice(self, start: int, stop: int) -> CodedRows:
        """Rows [start, stop)."""
        first, last = self.offsets[start], self.offsets[stop]
        return CodedRows(
            self.offsets[start : stop + 1] - first,
            self.ids[first:last],
            self.codes[first:last],
            {name: plane[start:stop] for name, plane in self.rows.items()},
        )

    @staticmethod
    def concatenate(parts: Sequence[CodedRows]) -> CodedRows:
        """Rows of all parts, which one codec made, in order."""
        return CodedRows(
            offsets_of(np.concatenate([np.diff(part.offsets) for part in parts])),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.codes for part in parts]),
            {name: np.concatenate([part.rows[name] for part in parts]) for name in parts[0].rows},
        )


@dataclass(frozen=True)
class RowCodec:
    """Encodes N rows into planes and back.

    Args:
        layout: "small" (fewest bytes) or "fast" (fastest to read).
        values: codes the weights.
        masked: whether a mask says which rows count; the others are not stored.
    """

    layout: LayoutName
    values: ValueCodec
    masked: bool = False

    @classmethod
    def for_selection(
        cls, method: str, size: int, exponent: float | None, layout: LayoutName, masked: bool = False
    ) -> RowCodec:
        """The codec of a selection's rows; arguments as in `logitcache.selection.Selection`."""
        values: ValueCodec
        if method == "sample":
            values = CountValues(size) if exponent is None else WeightValues()
        else:
            values = {"varopt": HeadTailValues, "label": NoValues}.get(method, ProbabilityValues)()
        return cls(layout, values, masked)

    def stores(self, method: str, size: int, exponent: float | None) -> bool:
        """Whether FORMAT.md gives a selection this coding of values; arguments as in `for_selection`."""
        usual = RowCodec.for_selection(method, size, exponent, self.layout).values
        return self.values == usual if isinstance(usual, CountValues) else type(self.values) is type(usual)

    @property
    def needs_contexts(self) -> bool:
        """Whether the codebook must list candidates for each token."""
        return LAYOUTS[self.layout].needs_contexts

    @property
    def keeps_ids(self) -> bool:
        """Whether rows have entries; else only their columns are stored."""
        return bool(self.values.plane)

    def encode(
        self,
        tokens: NDArray[np.int64],
        targets: SparseTargets,
        codebook: Codebook,
        dither: Dither,
        counted: NDArray[np.bool_] | None = None,
    ) -> Planes:
        """Planes of N rows.

        Args:
            tokens: int64 [N], the token at each row's position.
            targets: N rows.
            codebook: the cache's tables.
            dither: uniform numbers for rounding at random.
            counted: of a masked codec, bool [N], which rows count; nothing of the others is kept.

        Raises:
            TargetsError: a value cannot be stored; the message names the row.
        """
        return self.pack(tokens, self.code(targets, dither, counted), codebook)

    def decode(self, tokens: NDArray[np.int64], planes: Planes, codebook: Codebook) -> SparseTargets:
        """The rows back; `tokens` int64 [N] are those that were encoded with them.

        Raises:
            DamagedCacheError: the planes contradict each other.
        """
        return self.targets(self.unpack(tokens, planes, codebook))

    def code(self, targets: SparseTargets, dither: Dither, counted: NDArray[np.bool_] | None = None) -> CodedRows:
        """The rows as integers, before they are laid out; arguments as in `encode`. Raises TargetsError."""
        if self.masked != (counted is not None):
            raise TargetsError(f"the codec {'needs a mask' if self.masked else 'has no place for a mask'} of the rows")
        if counted is not None:
            targets = targets.take(np.flatnonzero(counted))
        if targets.unbiased != self.values.unbiased:
            kinds = ("exact probabilities", "unbiased samples")
            raise TargetsError(
                f"the {self.values.name} codec stores {kinds[self.values.unbiased]}; these targets hold "
                f"{kinds[targets.unbiased]}"
            )
        check_rows(targets.row_lengths)
        codes, of_rows = self.values.encode(targets, dither)
        side = {
            "label_logprob": columns.encode_logprob(targets.label_logprob),
            "entropy": columns.encode_entropy(targets.entropy),
        }
        return CodedRows(targets.offsets, targets.ids, codes, {**of_rows, **side}).spread(counted)

    def targets(self, coded: CodedRows, memory: Memory = FRESH) -> SparseTargets:
        """The inverse of `code`; rows that do not count are empty. Raises DamagedCacheError."""
        counted, coded = coded.counted, coded.stored()
        values = self.values.decode(coded.codes, coded.rows, coded.offsets, memory)
        targets = from_codec(
            coded.offsets,
            coded.ids,
            values.weights,
            unbiased=self.values.unbiased,
            tail_mass=values.tail_mass,
            threshold=values.threshold,
            label_logprob=columns.decode_logprob(coded.rows["label_logprob"]),
            entropy=columns.decode_entropy(coded.rows["entropy"]),
        )
        return targets if counted is None else targets.spread(counted)

    def pack(self, tokens: NDArray[np.int64], coded: CodedRows, codebook: Codebook) -> Planes:
        """Planes of coded rows: nothing is rounded, so rows can move between caches without loss."""
        packed = self._pack(Context.of(tokens, coded.counted), coded.stored(), codebook)
        return {"counted": coded.rows["counted"], **packed} if self.masked else packed

    def _pack(self, context: Context, coded: CodedRows, codebook: Codebook) -> Planes:
        lengths = np.diff(coded.offsets)
        check_rows(lengths)
        check_vocabulary(coded.offsets, coded.ids, codebook.ranks.vocab_size)
        if not self.keeps_ids:
            return dict(coded.rows)
        ids, order = LAYOUTS[self.layout].encode(context, coded.offsets, coded.ids, codebook)
        planes = {"ids": ids, self.values.plane: coded.codes if order is None else coded.codes[order], **coded.rows}
        return planes if self._lengths_follow else {"lengths": lengths, **planes}

    def unpack(
        self, tokens: NDArray[np.int64], planes: Planes, codebook: Codebook, memory: Memory = FRESH
    ) -> CodedRows:
        """The inverse of `pack`. Raises DamagedCacheError."""
        counted = self.counted(planes.get("counted"), tokens.size)
        if counted is not None:
            planes = {name: plane for name, plane in planes.items() if name != "counted"}
        return self._unpack(Context.of(tokens, counted), planes, codebook, memory).spread(counted)

    def _unpack(self, context: Context, planes: Planes, codebook: Codebook, memory: Memory) -> CodedRows:
        num_rows = context.tokens.size
        of_rows = [*self.values.of_rows, *_SIDE]
        sized = of_rows if self._lengths_follow or not self.keeps_ids else ["lengths", *of_rows]
        entries = ["ids", self.values.plane] if self.keeps_ids else []
        _check_planes(planes, [*entries, *sized], sized, num_rows)
        rows = {name: planes[name].astype(np.int64) for name in of_rows}
        if not self.keeps_ids:
            none = np.zeros(0, dtype=np.int64)
            return CodedRows(np.zeros(num_rows + 1, dtype=np.int64), none, none, rows)
        codes = planes[self.values.plane]
        lengths = self._walk_counts(codes, num_rows) if self._lengths_follow else planes["lengths"].astype(np.int64)
        _check_lengths(lengths, planes["ids"].size, codes.size)
        stored = LAYOUTS[self.layout].decode(context, planes["ids"], lengths, codebook, memory)
        ordered = codes if stored.places is None else codes[stored.places]
        return CodedRows(stored.offsets, stored.ids, ordered, rows)

    def counted(self, plane: NDArray[Any] | None, num_rows: int) -> NDArray[np.bool_] | None:
        """bool [N], which rows count, of the plane `counted`; None, for all, without a mask.

        Raises DamagedCacheError.
        """
        if not self.masked:
            return None
        if plane is None:
            raise DamagedCacheError("there is no plane 'counted'")
        if plane.size != num_rows or int(plane.max(initial=0)) > 1:
            raise DamagedCacheError(f"plane 'counted' does not say 0 or 1 for each of {num_rows} rows")
        return plane > 0

    @property
    def _lengths_follow(self) -> bool:
        """Slot-major counts tell where a row ends, so that lengths need no plane."""
        return self.layout == "small" and isinstance(self.values, CountValues)

    def _walk_counts(self, plane: NDArray[np.integer[Any]], num_rows: int) -> NDArray[np.int64]:
        """Row lengths from counts: slot by slot, a row goes on until its counts reach the number of draws."""
        assert isinstance(self.values, CountValues)
        counts = plane.astype(np.int64) + 1
        left = np.full(num_rows, self.values.draws, dtype=np.int64)
        lengths = np.zeros(num_rows, dtype=np.int64)
        active, position, slot = np.arange(num_rows), 0, 0
        while active.size:
            taken = counts[position : position + active.size]
            if taken.size != active.size:
                raise DamagedCacheError("the counts end before every row has its draws")
            position, slot = position + active.size, slot + 1
            left = left - taken
            lengths[active[left <= 0]] = slot
            if (left < 0).any():
                raise DamagedCacheError(f"a row's counts do not sum to {self.values.draws} draws")
            active, left = active[left > 0], left[left > 0]
        if position != plane.size:
            raise DamagedCacheError("there are more counts than rows need")
        return lengths

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored in plan and manifest."""
        parameters = asdict(self.values)  # type: ignore[call-overload]
        mask = {"masked": True} if self.masked else {}
        return {"layout": self.layout, "values": self.values.name, **parameters, **mask}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RowCodec:
        """Build the codec a manifest names. Raises FormatVersionError for one this version does not know."""
        parameters = {key: value for key, value in fields.items() if key not in ("layout", "values", "masked")}
        try:
            values = _KINDS[fields["values"]](**parameters)
            if fields["layout"] not in LAYOUTS:
                raise KeyError(fields["layout"])
            if fields.get("masked", True) is not True:
                raise TypeError("where there is no mask, nothing is said of it")
            if asdict(values) != parameters:
                raise TypeError("a parameter is absent")
            if not all(type(value) is int and value in PARAMETERS[name] for name, value in parameters.items()):
                raise TypeError("a parameter is out of range")
        except (KeyError, TypeError) as error:
            raise FormatVersionError(f"codec {fields} is unknown to this version; upgrade logitcache") from error
        return cls(fields["layout"], values, "masked" in fields)


def _check_planes(planes: Planes, names: Sequence[str], of_rows: Sequence[str], num_rows: int) -> None:
    """Raise DamagedCacheError unless just `names` are there and those `of_rows` hold a number for each row."""
    absent = [name for name in names if name not in planes]
    if absent:
        raise DamagedCacheError(f"there is no plane {absent[0]!r}")
    strange = sorted(set(planes) - set(names))
    if strange:
        raise DamagedCacheError(f"plane {strange[0]!r} is none of this codec")
    for name in of_rows:
        if planes[name].size != num_rows:
            raise DamagedCacheError(f"plane {name!r} has {planes[name].size} numbers for {num_rows} rows")


def _check_lengths(lengths: NDArray[np.int64], *num_entries: int) -> None:
    """Raise DamagedCacheError, before anything of that size is allocated, unless lengths add up to the entries."""
    if lengths.max(initial=0) > MAX_LENGTH:
        raise DamagedCacheError(f"a row of {int(lengths.max())} entries is longer than the format allows")
    if any(int(lengths.sum()) != count for count in num_entries):
        raise DamagedCacheError("the planes disagree about the number of entries")
