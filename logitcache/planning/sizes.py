"""From the rows of a sample to the bytes of a whole cache.

A cache's bytes are those of its tables, of its JSON documents, and of its shards: so much a file, a chunk and a token.
Rows cost fewer bytes the more rows the tables were counted from, evenly with each doubling; those that the tables were
counted from cost less than others. The sample gives each of these: its halves are coded with tables counted from an
eighth, a quarter and a half of it, and in one chunk, two chunks and two files. docs/planning.md has the formulas.

Legend: n tokens of the sample, h = n / 2, N tokens of the cache, P tokens of its first chunk, the pilot.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import Codebook, CodedRows, Planes, RowCodec
from logitcache.store import Cache, Geometry, Identity, Manifest, Origin, Plan
from logitcache.store.container import write_container
from logitcache.store.files import checked_json
from logitcache.store.layout import SUFFIXES, ContainerKind, unit_name
from logitcache.store.schema import FORMAT_VERSION, Commit, Shard

# Doublings beyond the sample gain a little less than those inside it (measured on SmolLM2 from 1,024 to 65,536 rows).
_DAMPING = 0.85
_HASH = "0" * 64


@dataclass(frozen=True)
class SizeModel:
    """What a cache's bytes are made of, by a sample.

    Args:
        half: h, rows that the largest tables of the sample were counted from.
        row: bytes of a row coded with them.
        doubling: what is added to that when the tables are counted from twice as many rows; not positive.
        pilot_gain: how much less one of the rows takes that they were counted from.
        tables: bytes of the tables beyond `no_tables`, the bytes of empty ones.
        growth: exponent by which tables grow with the rows they are counted from.
        chunk, file: bytes of a chunk, and of a file, beside those of its rows.
        error: two relative standard errors of `row`, by how much parts of the sample differ.
        seconds: for a token, to lay out and write.
    """

    half: int
    row: float
    doubling: float
    pilot_gain: float
    tables: float
    no_tables: float
    growth: float
    chunk: float
    file: float
    error: float
    seconds: float

    def num_bytes(self, identity: Identity, origin: Origin | None = None) -> float:
        """Of all files of a cache."""
        geometry = identity.geometry
        pilot = self._pilot(geometry)
        row, tables, gain = self.at(pilot)
        rows = geometry.num_tokens * row - pilot * gain
        shards = rows + _chunks(geometry) * self.chunk + geometry.num_units * self.file
        return shards + self.no_tables + tables + json_bytes(identity, origin or Origin())

    def uncertainty(self, identity: Identity) -> float:
        """Two relative standard errors of `num_bytes`: parts of the sample differ, and what tables counted from more
        rows than the sample has will gain is as uncertain as it is large.
        """
        pilot = self._pilot(identity.geometry)
        gain = -self.doubling * max(0.0, math.log2(pilot / self.half))
        return math.hypot(self.error, gain / self.at(pilot)[0])

    def at(self, pilot: int) -> tuple[float, float, float]:
        """Bytes of a row, of the tables, and what a row of the pilot takes less, with tables of so many rows."""
        doublings = math.log2(pilot / self.half)
        row = self.row + self.doubling * doublings * (_DAMPING if doublings > 0 else 1.0)
        tables = self.tables * 2 ** (self.growth * doublings)
        # Rows fit tables counted from them because there is an entry for what they hold: the fewer rows, the better.
        entries = 2 ** ((self.growth - 1) * doublings)
        return max(row, 0.5 * self.row), tables, min(self.pilot_gain * entries, 0.5 * self.row)

    @staticmethod
    def _pilot(geometry: Geometry) -> int:
        """P: tokens of the first chunk."""
        return geometry.tokens_in(0, min(geometry.chunk_blocks, geometry.num_blocks))


def measure_sizes(cache: Cache, codec: RowCodec) -> SizeModel:
    """The model by a cache's rows, laid out by `codec`; its value coding must be the cache's."""
    parts = [cache.read_coded(chunk) for chunk in cache.chunks]
    tokens, coded = np.concatenate([part[0] for part in parts]), CodedRows.concatenate([part[1] for part in parts])
    half = len(coded) // 2
    rows = _Rows(codec, cache.manifest.identity.container, cache.vocab_size, tokens, coded)
    # Either half of the sample with tables of the other: a real pilot is the corpus' beginning, the rest is not.
    both = [
        _measure_half(rows, range(half), range(half, 2 * half)),
        _measure_half(rows, range(half, 2 * half), range(half)),
    ]
    sizes = [statistics.mean(one.rows[step] for one in both) for step in range(3)]
    few, many = (statistics.mean(one.tables[step] for one in both) for step in range(2))
    quarters = [quarter for one in both for quarter in one.quarters]
    # A line through the three, one doubling apart each.
    doubling = min(0.0, (sizes[2] - sizes[0]) / 2)
    fitted = statistics.mean(sizes) + doubling
    return SizeModel(
        half=half,
        row=fitted if doubling else statistics.mean(sizes),
        doubling=doubling,
        pilot_gain=max(0.0, sizes[2] - statistics.mean(one.own for one in both)),
        tables=many,
        no_tables=rows.no_tables,
        # From an eighth to a half of the sample they double twice.
        growth=min(1.0, max(0.0, math.log2((many + 1) / (few + 1)) / 2)),
        chunk=statistics.mean(one.chunk for one in both),
        file=statistics.mean(one.file for one in both),
        error=_error(quarters),
        seconds=min(one.seconds for one in both),
    )


class _Rows:
    """Rows of a sample, packed and written as shards would be."""

    def __init__(
        self,
        codec: RowCodec,
        container: ContainerKind,
        vocab_size: int,
        tokens: NDArray[np.int64],
        coded: CodedRows,
    ) -> None:
        self._codec, self._container, self._vocab_size = codec, container, vocab_size
        self._tokens, self._coded = tokens, coded
        self._targets = codec.targets(coded)

    def book(self, start: int, stop: int) -> Codebook:
        """Tables counted from rows [start, stop)."""
        return Codebook.from_pilot(
            self._tokens[start:stop], self._targets.slice(start, stop), self._vocab_size, self._codec.needs_contexts
        )

    def pack(self, start: int, stop: int, book: Codebook) -> Planes:
        """Planes of rows [start, stop)."""
        tokens = self._tokens[start:stop]
        ranks = book.ranks.encode(tokens)
        return {"tokens": ranks, **self._codec.pack(tokens, self._coded.slice(start, stop), book)}

    def counted(self, part: range) -> int:
        """How many of some rows count."""
        counted = self._coded.counted
        return len(part) if counted is None else int(counted[part.start : part.stop].sum())

    def shard_bytes(self, chunks: Sequence[Planes]) -> int:
        """Of a shard of these chunks."""
        return self._written(chunks, {"role": "shard", "unit": unit_name(0), "first_block": 0, "num_tokens": 0})

    def table_bytes(self, book: Codebook) -> int:
        """Of the tables' file, beyond those of one without entries."""
        return self._written([book.to_planes()], {"role": "codebook"}) - self.no_tables

    @cached_property
    def no_tables(self) -> int:
        """Bytes of the file of tables without entries."""
        nothing = np.zeros(0, dtype=np.int64)
        empty = {"ids": nothing, "context_sizes": nothing, "candidates": nothing}
        return self._written([empty], {"role": "codebook"})

    def _written(self, chunks: Sequence[Planes], attributes: dict[str, object]) -> int:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"file{SUFFIXES[self._container]}"
            more = {"format_version": FORMAT_VERSION, "plan": _HASH}
            write_container(self._container, path, chunks, {**more, **attributes})
            return path.stat().st_size


@dataclass(frozen=True)
class _Part:
    """Some rows: their number, how many of them count, and their bytes beside those of chunk and file."""

    rows: int
    counted: int
    bytes: float


def _error(parts: Sequence[_Part]) -> float:
    """Two relative standard errors of the bytes of a row. Rows that count and rows that do not cost what fits all parts
    best: that one part has more of them than another is no error, as it is known of the whole.
    """
    facts = np.array([[part.rows, part.counted] for part in parts], dtype=np.float64)
    if (facts[:, 0] == facts[:, 1]).all():
        facts = facts[:, :1]
    size = np.array([part.bytes for part in parts])
    fitted = facts @ np.linalg.lstsq(facts, size)[0]
    off = float(np.sqrt(np.square(size - fitted).sum() / (len(parts) - facts.shape[1])))
    return 2 * off / math.sqrt(len(parts)) / float(size.mean())


@dataclass(frozen=True)
class _Half:
    """One half of a sample, coded with tables of the other.

    Args:
        rows: bytes a row, with tables of an eighth, a quarter and a half of the sample.
        tables: bytes of the first and the last of them, beyond those of empty ones.
        own: bytes of a row that the last of them were counted from.
        quarters: of each half of this half.
        chunk, file: bytes beside the rows'.
        seconds: a token.
    """

    rows: list[float]
    tables: list[float]
    own: float
    quarters: list[_Part]
    chunk: float
    file: float
    seconds: float


def _measure_half(rows: _Rows, pilot: range, held: range) -> _Half:
    count = len(held)
    middle = held.start + count // 2
    books = [rows.book(pilot.start, pilot.start + count // part) for part in (4, 2, 1)]
    whole = [rows.shard_bytes([rows.pack(held.start, held.stop, book)]) for book in books]
    started = time.perf_counter()
    own = rows.shard_bytes([rows.pack(pilot.start, pilot.stop, books[-1])])
    seconds = time.perf_counter() - started
    cut = [rows.pack(held.start, middle, books[-1]), rows.pack(middle, held.stop, books[-1])]
    apart = [rows.shard_bytes([planes]) for planes in cut]
    # The same rows in one chunk, in two chunks, and in two files.
    chunk = rows.shard_bytes(cut) - whole[-1]
    fixed = sum(apart) - whole[-1]
    return _Half(
        rows=[(size - fixed) / count for size in whole],
        tables=[float(rows.table_bytes(book)) for book in (books[0], books[-1])],
        own=(own - fixed) / count,
        quarters=[
            _Part(len(part), rows.counted(part), size - fixed)
            for size, part in zip(apart, (range(held.start, middle), range(middle, held.stop)), strict=True)
        ],
        chunk=chunk,
        file=fixed - chunk,
        seconds=seconds / count,
    )


def _chunks(geometry: Geometry) -> int:
    """Of all units; the last unit may be shorter."""
    first, stop = geometry.unit_range(geometry.num_units - 1)
    return (geometry.num_units - 1) * geometry.chunks_in(geometry.unit_blocks) + geometry.chunks_in(stop - first)


def json_bytes(identity: Identity, origin: Origin) -> int:
    """Of a finished cache's plan, commit records and manifest."""
    plan = Plan(identity=identity, origin=origin)
    geometry = identity.geometry
    shard = Shard(
        unit=unit_name(geometry.num_units - 1),
        file=f"{unit_name(0)}-{_HASH[:12]}{SUFFIXES[identity.container]}",
        sha256=_HASH,
        num_bytes=10 ** len(str(geometry.unit_blocks * geometry.block_length)),
        first_block=geometry.num_blocks - 1,
        num_blocks=geometry.unit_blocks,
        num_tokens=min(geometry.num_tokens, geometry.unit_blocks * geometry.block_length),
        num_entries=identity.selection.size * geometry.unit_blocks * geometry.block_length,
    )
    masked = RowCodec.from_dict(identity.codec).masked
    commit = Commit(
        **shard.model_dump(),
        plan=_HASH,
        codebook_sha256=_HASH,
        counters={"counted": shard.num_tokens} if masked else {},
    )
    counters = {"counted": geometry.num_tokens} if masked else {}

    def manifest_bytes(shards: int) -> int:
        manifest = Manifest(
            fingerprint=_HASH, complete=True, identity=identity, origin=origin, codebook_sha256=_HASH,
            counters=counters,
            shards=[shard] * shards,
        )  # fmt: skip
        return _json_length(manifest)

    one = manifest_bytes(1)
    line = manifest_bytes(2) - one
    return _json_length(plan) + geometry.num_units * _json_length(commit) + one + (geometry.num_units - 1) * line


def _json_length(document: Plan | Commit | Manifest) -> int:
    return len(checked_json(document.model_dump(mode="json")))
