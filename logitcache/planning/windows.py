"""Short stretches of a large corpus, spread over all of it, each as a file of its own that any reader of corpora takes.

Only what is cut is read, except of gzip, which can only be read from its beginning.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from logitcache.corpus import CorpusFile
from logitcache.corpus.sources import unreadable

if TYPE_CHECKING:
    import pyarrow as pa

_CONTINUATION = range(0x80, 0xC0)


@dataclass(frozen=True)
class Window:
    """A stretch of a corpus file.

    Args:
        source: the file it was cut from.
        file: holds the stretch, under the same name.
        bytes: how many of that file's bytes it stands for.
    """

    source: CorpusFile
    file: CorpusFile
    bytes: float


def file_sizes(files: Sequence[CorpusFile]) -> list[int]:
    """Bytes of each file. Raises CorpusError."""
    try:
        return [file.path.stat().st_size for file in files]
    except OSError as error:
        raise unreadable(str(error.filename), error) from error


def cut_windows(files: Sequence[CorpusFile], folder: Path, count: int, wanted: int, stop: int) -> list[Window]:
    """About `count` windows at even distances in the first `stop` bytes of the files, one after another.

    Args:
        folder: where they are written.
        count: windows; of a file that can only be read from its beginning one is made.
        wanted: bytes of each; records stay whole.

    Raises:
        CorpusError: a file cannot be read.
    """
    ends = list(accumulate(file_sizes(files)))
    windows, begun = [], set()
    taken: float
    for number in range(count):
        place = int((number + 0.5) * stop / count)
        index = next(index for index, end in enumerate(ends) if place < end)
        file, size = files[index], ends[index] - (ends[index - 1] if index else 0)
        zipped = file.path.name.lower().endswith(".gz")
        if zipped and index in begun:
            continue
        begun.add(index)
        target = folder / f"{number:06d}-{file.path.name}"
        start = place - (ends[index] - size)
        try:
            if zipped:
                taken = _from_gzip(file.path, target, wanted)
            elif file.kind in ("parquet", "arrow"):
                cut = _from_parquet if file.kind == "parquet" else _from_arrow
                taken = cut(file.path, target, start / size, wanted) * size
            else:
                taken = _from_bytes(file.path, target, start, wanted, lines=file.kind == "jsonl")
        except OSError as error:
            raise unreadable(str(file), error) from error
        windows.append(Window(file, CorpusFile(file.name, target), taken))
    return windows


def _from_bytes(source: Path, target: Path, start: int, wanted: int, lines: bool) -> int:
    """Cut at the ends of lines if `lines`, else between characters; the file's beginning is taken where none fits."""
    with source.open("rb") as stream:
        stream.seek(start)
        if lines:
            # The line that is under way is left out, as records must be whole.
            if start:
                stream.readline()
            data = b"".join(stream.readlines(wanted))
            if not data.strip():
                stream.seek(0)
                data = b"".join(stream.readlines(wanted))
        else:
            data = _characters(stream.read(wanted))
    target.write_bytes(data)
    return len(data)


def _characters(data: bytes) -> bytes:
    """Without the parts of UTF-8 characters that were cut at either end. Bytes that are no UTF-8 stay."""
    first = next((place for place, byte in enumerate(data[:4]) if byte not in _CONTINUATION), 0)
    for kept in range(len(data), max(first, len(data) - 4), -1):
        lead = data[kept - 1]
        if lead not in _CONTINUATION:
            needed = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
            return data[first : kept - 1 if len(data) - kept + 1 < needed else len(data)]
    return data[first:]


def _from_gzip(source: Path, target: Path, wanted: int) -> int:
    """The first lines; how many compressed bytes they took."""
    with source.open("rb") as raw, gzip.open(raw) as stream:
        # So much that the compressed bytes, which are read in blocks, are counted well enough.
        data = b"".join(stream.readlines(max(wanted, 1 << 21)))
        taken = raw.tell()
    with gzip.open(target, "wb", compresslevel=1) as copy:
        copy.write(data)
    return taken


def _from_parquet(source: Path, target: Path, place: float, wanted: int) -> float:
    """Rows from about `place` (0 to 1) of the file on; the share of the file's rows that they are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as parquet:
            rows = parquet.metadata.num_rows
            first, group = int(place * rows), 0
            while group + 1 < parquet.num_row_groups and first >= parquet.metadata.row_group(group).num_rows:
                first -= parquet.metadata.row_group(group).num_rows
                group += 1
            table = parquet.read_row_group(group) if parquet.num_row_groups else parquet.read()
            table = _rows(table, first, wanted)
            pq.write_table(table, target)
    except pa.ArrowException:
        # What is wrong with it is told by the reader of corpora.
        target.write_bytes(source.read_bytes()[:wanted])
        return 1.0
    return table.num_rows / max(1, rows)


def _from_arrow(source: Path, target: Path, place: float, wanted: int) -> float:
    """As `_from_parquet`, of an Arrow file or stream; of one that is not compressed only these rows are read."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(source)) as mapped:
            table = _arrow_table(mapped)
            rows, first = table.num_rows, int(place * table.num_rows)
            part = _rows(table, first, wanted)
            part.validate(full=True)
            with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as writer:
                writer.write_table(part)
            return part.num_rows / max(1, rows)
    except pa.ArrowException:
        target.write_bytes(source.read_bytes()[:wanted])
        return 1.0


def _arrow_table(mapped: pa.MemoryMappedFile) -> pa.Table:
    import pyarrow as pa

    try:
        return pa.ipc.open_file(mapped).read_all()
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_stream(mapped).read_all()


def _rows(table: pa.Table, first: int, wanted: int) -> pa.Table:
    """Rows from the number `first` on, of about `wanted` bytes; earlier ones where too few follow."""
    if not table.num_rows:
        return table
    share = max(1, min(table.num_rows, int(wanted * table.num_rows / max(1, table.nbytes))))
    return table.slice(min(first, table.num_rows - share), share)
