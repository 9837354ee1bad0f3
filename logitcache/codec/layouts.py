"""Where the entries of rows go: the `ids` plane, and the order in which all other planes of entries follow it.

`fast` stores rows as they are read, ids ascending, so that decoding is one running sum. `small` stores each row's
context keys ascending, and slot-major: all rows' first entries, then all rows' second ones, and so on, because entries
of one slot resemble each other more than entries of one row.

Legend: N rows, nnz entries, K longest row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from logitcache.codec.codebook import Codebook
from logitcache.codec.memory import FRESH, Memory
from logitcache.errors import DamagedCacheError, TargetsError
from logitcache.targets import offsets_of

MAX_LENGTH = 65_535
# Sorting packs a key (33 bits) and the entry's place (31 bits) into one 64-bit number.
PLACE_BITS = np.uint64(31)
PLACE_MASK = np.uint64((1 << 31) - 1)
LAST = np.uint64(0xFFFFFFFFFFFFFFFF)
# Up to here a step of the running sum of ids, and the first sum to leave the vocabulary, fit into 32 bits.
NARROW_VOCABULARY = 1 << 29
# Turned over at once, so that they stay in a processor's cache.
ROWS_AT_ONCE = 512
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """Decoded ids, and where each one's value lies in the stored planes.

    Args:
        offsets: int64 [N + 1].
        ids: int64, or int32 in narrow memory, [nnz]; ascending within a row.
        places: int64 [nnz], or None when stored in this very order.
    """

    offsets: Ints
    ids: NDArray[Any]
    places: Ints | None


@dataclass(frozen=True, eq=False)
class Context:
    """The text around N rows.

    Args:
        tokens: int64 [N], the token at each row's position.
        following: int64 [N], the one at the chunk's next position, -1 where there is none. It only predicts, so block
            borders do not matter.
    """

    tokens: Ints
    following: Ints

    @classmethod
    def of(cls, tokens: Ints, kept: NDArray[np.bool_] | None = None) -> Context:
        """Of a chunk's positions, or those of them that are `kept` (bool [positions])."""
        following = np.append(tokens[1:], -1)
        return cls(tokens, following) if kept is None else cls(tokens[kept], following[kept])


class Layout(Protocol):
    """How ids and the order of entries are stored."""

    needs_contexts: bool

    def encode(self, context: Context, offsets: Ints, ids: Ints, codebook: Codebook) -> tuple[Ints, Ints | None]:
        """The `ids` plane of rows in CSR form, and the entries in their stored order (None: unchanged)."""

    def decode(
        self, context: Context, plane: NDArray[Any], lengths: Ints, codebook: Codebook, memory: Memory = FRESH
    ) -> Rows:
        """Rows of a plane whose numbers and lengths are consistent. Raises DamagedCacheError."""


class FastLayout:
    """Ids ascending, row after row.

    The plane holds, for a row's first id, the zigzag of its difference to the id before it (0 for the chunk's first
    entry), and for every other id the difference to the one before, minus 1.
    """

    needs_contexts = False

    def encode(self, context: Context, offsets: Ints, ids: Ints, codebook: Codebook) -> tuple[Ints, Ints | None]:
        steps = np.diff(ids, prepend=0) - 1
        starts = _row_starts(offsets)
        first = steps[starts] + 1
        steps[starts] = np.where(first >= 0, 2 * first, -2 * first - 1)
        return steps, None

    def decode(
        self, context: Context, plane: NDArray[Any], lengths: Ints, codebook: Codebook, memory: Memory = FRESH
    ) -> Rows:
        offsets = offsets_of(lengths)
        vocab_size = codebook.ranks.vocab_size
        # Bounds the running sum: it cannot wrap around into the vocabulary.
        if plane.size and int(plane.max()) > 2 * vocab_size:
            raise DamagedCacheError(f"a stored id is outside the vocabulary of {vocab_size} ids")
        narrow = memory.narrow and vocab_size <= NARROW_VOCABULARY
        steps = memory.kept("ids", plane.size, np.int32 if narrow else np.int64)
        # A view where it can be: numpy converts slowly.
        signed = plane.view(np.int32) if narrow and plane.dtype == np.uint32 else plane
        np.add(signed, 1, out=steps, dtype=steps.dtype, casting="unsafe")
        starts = _row_starts(offsets)
        first = steps[starts] - 1
        steps[starts] = (first >> 1) ^ -(first & 1)
        ids = np.cumsum(steps, dtype=steps.dtype, out=steps)
        # Without their sign, negative numbers are the largest.
        if ids.size and int(ids.view(f"u{ids.itemsize}").max()) >= vocab_size:
            raise DamagedCacheError(f"a stored id is outside the vocabulary of {vocab_size} ids")
        return Rows(offsets, ids, None)


class SmallLayout:
    """Context keys ascending within a row, slot-major, as differences minus 1 (the first one as it is)."""

    needs_contexts = True

    def encode(self, context: Context, offsets: Ints, ids: Ints, codebook: Codebook) -> tuple[Ints, Ints | None]:
        slots = Slots(np.diff(offsets))
        rows = np.repeat(np.arange(slots.num_rows), np.diff(offsets))
        keys = codebook.contexts.encode(context.tokens, context.following, rows, ids)
        packed_NK = np.full((slots.num_rows, slots.longest), LAST)
        packed_NK[slots.filled_NK] = keys.astype(np.uint64) << PLACE_BITS | np.arange(keys.size, dtype=np.uint64)
        packed = np.sort(packed_NK, axis=1).ravel()[slots.cells]
        sorted_keys = (packed >> PLACE_BITS).astype(np.int64)
        return slots.differences(sorted_keys) - 1, (packed & PLACE_MASK).astype(np.int64)

    def decode(
        self, context: Context, plane: NDArray[Any], lengths: Ints, codebook: Codebook, memory: Memory = FRESH
    ) -> Rows:
        most = codebook.ranks.vocab_size + codebook.contexts.candidates.size
        if plane.size and int(plane.max()) > most:
            raise DamagedCacheError("a stored id is outside the vocabulary")
        filled_KN = np.arange(lengths.max(initial=0))[:, None] < lengths
        keys_KN = _running_sums(plane, filled_KN, memory)
        if keys_KN.size and int(keys_KN.max()) > most:
            raise DamagedCacheError("a stored id is outside the vocabulary")
        ids_KN = codebook.contexts.decode(context.tokens, context.following, keys_KN, memory)
        ordered = _sorted_entries(ids_KN, filled_KN, plane.size, memory)
        offsets = offsets_of(lengths)
        narrow = memory.narrow and codebook.ranks.vocab_size <= NARROW_VOCABULARY
        ids = memory.kept("ids", ordered.size, np.int32 if narrow else np.int64)
        np.right_shift(ordered, PLACE_BITS, out=ids, casting="unsafe")
        rises = ids[1:] > ids[:-1]
        rises[_row_starts(offsets)[1:] - 1] = True
        if not rises.all():
            raise DamagedCacheError("a row holds one id twice")
        places = ordered.view(np.int64)
        places &= np.int64(PLACE_MASK)
        return Rows(offsets, ids, places)


def _running_sums(plane: NDArray[Any], filled_KN: NDArray[np.bool_], memory: Memory) -> NDArray[np.int64]:
    """int64 [K, N]: each row's sums of a slot-major plane's numbers, each plus 1, minus 1. Padding repeats the last."""
    sums_KN = memory.scratch("sums", filled_KN.size, np.int64).reshape(filled_KN.shape)
    if plane.size == sums_KN.size:
        sums_KN[...] = plane.reshape(sums_KN.shape)
    else:
        sums_KN[...] = 0
        sums_KN[filled_KN] = plane
    # Slot by slot: several times as fast as numpy's cumsum along the first axis.
    before_N: Ints | int = -1
    for here_N, filled_N in zip(sums_KN, filled_KN, strict=True):
        here_N += filled_N
        here_N += before_N
        before_N = here_N
    return sums_KN


def _sorted_entries(ids_KN: Ints, filled_KN: NDArray[np.bool_], count: int, memory: Memory) -> NDArray[np.uint64]:
    """uint64 [count]: each filled cell's id and, in the low bits, its place in the plane; by rows, ids ascending."""
    packed_KN, full = ids_KN.view(np.uint64), count == ids_KN.size
    packed_KN <<= PLACE_BITS
    if full:
        packed_KN |= np.arange(count, dtype=np.uint64).reshape(packed_KN.shape)
    else:
        packed_KN |= (np.cumsum(filled_KN, dtype=np.uint64) - np.uint64(1)).reshape(packed_KN.shape) & PLACE_MASK
        # All ones where nothing is, so that sorting puts it last.
        packed_KN |= filled_KN.astype(np.uint64) - np.uint64(1)
    packed_NK = memory.scratch("sorted", packed_KN.size, np.uint64).reshape(packed_KN.shape[::-1])
    for start in range(0, len(packed_NK), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        packed_NK[rows] = packed_KN[:, rows].T
    packed_NK.sort(axis=1)
    return packed_NK.ravel() if full else packed_NK[packed_NK != LAST]


class Slots:
    """Walks ragged rows slot-major.

    Attributes:
        num_rows, longest: N and K.
        filled_NK: bool [N, K], whether row n has a k-th entry.
        rows: int64 [nnz], the row of each entry, slot-major.
        cells: int64 [nnz], the entry's number in a flattened [N, K] grid, slot-major.
    """

    def __init__(self, lengths: Ints) -> None:
        self.num_rows, self.longest = lengths.size, int(lengths.max(initial=0))
        self.filled_NK = np.arange(self.longest) < lengths[:, None]
        # Rows that have a k-th entry, for each k: how many, and which.
        self._sizes = self.num_rows - np.cumsum(np.bincount(lengths))[: self.longest]
        active, parts = np.arange(self.num_rows), [np.zeros(0, dtype=np.int64)]
        for slot, size in enumerate(self._sizes):
            # Where no row ends, none needs to be looked at.
            active = active if size == active.size else active[lengths[active] > slot]
            parts.append(active)
        self.rows = np.concatenate(parts)
        self.cells = self.rows * self.longest + np.repeat(np.arange(self.longest), self._sizes)

    def differences(self, plane: Ints) -> Ints:
        """int64 [nnz]: each number minus the one before it in its row; the first is counted from -1."""
        before, position = np.full(self.num_rows, -1, dtype=np.int64), 0
        out = np.empty(plane.size, dtype=np.int64)
        for size in self._sizes:
            here = slice(position, position + size)
            rows = self.rows[here]
            out[here] = plane[here] - before[rows]
            before[rows] = plane[here]
            position += size
        return out


LAYOUTS: dict[str, Layout] = {"fast": FastLayout(), "small": SmallLayout()}


def check_rows(lengths: Ints) -> None:
    """Raise TargetsError for rows or chunks that are too long for the format."""
    if lengths.max(initial=0) > MAX_LENGTH:
        row = int(np.argmax(lengths > MAX_LENGTH))
        raise TargetsError(f"row {row} has {lengths[row]} entries; a cache stores at most {MAX_LENGTH} a row")
    if lengths.sum() >= 1 << int(PLACE_BITS):
        raise TargetsError(f"a chunk has {lengths.sum()} entries; store fewer than 2^31 at once")


def _row_starts(offsets: Ints) -> Ints:
    """First entry of every row that has one."""
    return offsets[:-1][np.diff(offsets) > 0]
