"""DistillKit's Parquet files as a list of sequences: which are taken, and their columns, streamed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logitcache.corpus import CorpusFile
from logitcache.errors import InterchangeError
from logitcache.interchange.folder import reading_parquet

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

TOKENS, LOGPROBS, IDS = "input_ids", "compressed_logprobs", "bytepacked_indices"
LEGACY = {"packed_indices", "exact_values", "coeffs"}
BATCH_SEQUENCES = 4


@dataclass(frozen=True)
class SequenceRow:
    """One row of a file.

    Args:
        where: file and row, for messages.
        tokens: int64 [L].
        logprobs, ids: uint8 [L, bytes], as the layout says.
    """

    where: str
    tokens: NDArray[np.int64]
    logprobs: NDArray[np.uint8]
    ids: NDArray[np.uint8]


@dataclass
class Sequences:
    """The sequences that an import takes, all of `length` positions but perhaps the last.

    Args:
        files: in order.
        length: positions of a block.
        missing: how many tokens a file's rows hold more than positions: DistillKit's captures have none for the last.
        taken: for each file, the numbers of the rows that are taken, int64.
        num_tokens: positions taken.
        left_out: sequences too short for `--block-length`.
        largest: the largest input token met, and where.
        sha256: of the taken tokens as little-endian int32.
    """

    files: list[CorpusFile]
    length: int
    missing: int
    taken: list[NDArray[np.int64]] = field(default_factory=list)
    num_tokens: int = 0
    left_out: int = 0
    largest: tuple[int, str] = (-1, "")
    sha256: str = ""

    @property
    def num_blocks(self) -> int:
        return sum(rows.size for rows in self.taken)

    def read(self, first_block: int) -> Iterator[SequenceRow]:
        """Sequences from a block on, in order; files and row groups before it are not read.

        Raises:
            InterchangeError: a file is damaged, or a row does not hold what its tokens promise.
        """
        import pyarrow.parquet as pq

        skip = first_block
        for file, rows in zip(self.files, self.taken, strict=True):
            if skip >= rows.size:
                skip -= rows.size
                continue
            wanted, skip = rows[skip:], 0
            with reading_parquet(file.path), pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
                yield from self._read_rows(file, parquet, wanted)

    def _read_rows(self, file: CorpusFile, parquet: pq.ParquetFile, wanted: NDArray[np.int64]) -> Iterator[SequenceRow]:
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        ends = np.cumsum(sizes)
        first_group = int(np.searchsorted(ends, wanted[0], side="right"))
        number = int(ends[first_group]) - sizes[first_group]
        takes = set(wanted.tolist())
        groups = list(range(first_group, len(sizes)))
        for batch in parquet.iter_batches(BATCH_SEQUENCES, row_groups=groups, columns=[TOKENS, LOGPROBS, IDS]):
            for place in range(batch.num_rows):
                if number in takes:
                    yield self._row(f"{file}, sequence {number}", batch, place)
                number += 1

    def _row(self, where: str, batch: pa.RecordBatch, place: int) -> SequenceRow:
        tokens = _numbers(where, TOKENS, batch.column(TOKENS)[place].values)
        columns = {name: _byte_rows(where, name, batch.column(name)[place].values) for name in (LOGPROBS, IDS)}
        for name, rows in columns.items():
            if len(rows) + self.missing != tokens.size:
                raise InterchangeError(
                    f"{where} has {tokens.size} tokens but {len(rows)} positions of {name}; in the sequences before it "
                    f"there were {self.missing} tokens more than positions, so the files do not fit together"
                )
        cut = min(self.length, tokens.size - self.missing)
        return SequenceRow(where, tokens[:cut], columns[LOGPROBS][:cut], columns[IDS][:cut])


def parquet_files(paths: Sequence[str | os.PathLike[str]]) -> list[CorpusFile]:
    """Files as given, and the Parquet files of folders sorted by name; one reached twice counts once.

    Raises:
        InterchangeError: a path does not exist, or a folder holds no Parquet file.
    """
    unique: dict[str, CorpusFile] = {}
    for given in map(Path, paths):
        if not given.exists():
            raise InterchangeError(f"{given} does not exist; give Parquet files or folders of them")
        inside = sorted(given.rglob("*.parquet")) if given.is_dir() else [given]
        if not inside:
            raise InterchangeError(f"there is no .parquet file in {given}; give the dataset's files")
        for path in inside:
            name = path.relative_to(given).as_posix() if given.is_dir() else path.name
            unique.setdefault(os.path.realpath(path), CorpusFile(name, path))
    return list(unique.values())


def scan(files: list[CorpusFile], block_length: int | None) -> Sequences:
    """Read every file's tokens once: which sequences are taken, and a hash of their tokens.

    Args:
        block_length: keep this many positions of each sequence and leave shorter ones out. None: all sequences but
            the last must be of one length.

    Raises:
        InterchangeError: a file is damaged or lacks a column, sequences differ in length, or none is taken.
    """
    import pyarrow.parquet as pq

    length, missing = _first_lengths(files)
    found = Sequences(files, block_length or length, missing)
    digest = hashlib.sha256()
    odd: str | None = None
    for file in files:
        rows, number = [], 0
        with reading_parquet(file.path), pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
            check_columns(file.path, parquet.schema_arrow)
            for batch in parquet.iter_batches(64, columns=[TOKENS]):
                for scalar in batch.column(0):
                    where = f"{file}, sequence {number}"
                    tokens = _numbers(where, TOKENS, scalar.values)[: max(0, _positions(scalar, missing))]
                    if block_length is None:
                        odd = _one_length(odd, where, tokens.size, found.length)
                    if tokens.size >= (block_length or 1):
                        rows.append(number)
                        _take(found, digest, where, tokens[: found.length])
                    else:
                        found.left_out += 1
                    number += 1
        found.taken.append(np.array(rows, dtype=np.int64))
    if found.num_blocks == 0:
        raise InterchangeError(f"no sequence has {found.length} positions; choose a smaller --block-length")
    found.sha256 = digest.hexdigest()
    return found


def check_columns(path: Path, schema: pa.Schema) -> None:
    """Raise InterchangeError unless the file has the columns of DistillKit's captures, of the right types."""
    import pyarrow.types as kinds

    if set(schema.names) >= LEGACY:
        raise InterchangeError(
            f"{path} is in DistillKit's legacy format ({', '.join(sorted(LEGACY))}), whose values are centred logits, "
            "not log-probabilities; capture again with logprob_compressor"
        )
    for name, depth in ((TOKENS, 1), (LOGPROBS, 2), (IDS, 2)):
        if name not in schema.names:
            raise InterchangeError(
                f"{path} has no column {name!r}, only {', '.join(schema.names)}; DistillKit's captures have {TOKENS}, "
                f"{LOGPROBS} and {IDS}"
            )
        kind = schema.field(name).type
        for _ in range(depth):
            if not (kinds.is_list(kind) or kinds.is_large_list(kind)):
                break
            kind, depth = kind.value_type, depth - 1
        if depth or not kinds.is_integer(kind):
            shape = "lists of integers" if name == TOKENS else "lists of lists of bytes"
            raise InterchangeError(
                f"{path} holds {schema.field(name).type} in column {name!r}, not {shape}; give the files of a capture"
            )


def _first_lengths(files: list[CorpusFile]) -> tuple[int, int]:
    """Positions of the first sequence, and how many tokens it has more than positions (0 or 1)."""
    import pyarrow.parquet as pq

    for file in files:
        with reading_parquet(file.path), pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
            check_columns(file.path, parquet.schema_arrow)
            for batch in parquet.iter_batches(1, columns=[TOKENS, IDS]):
                tokens, positions = (_size(batch.column(name)[0]) for name in (TOKENS, IDS))
                if tokens - positions not in (0, 1) or positions < 1:
                    raise InterchangeError(
                        f"{file}, sequence 0 has {tokens} tokens and {positions} positions; DistillKit stores a "
                        "position for every token, or for every token but the last"
                    )
                return positions, tokens - positions
    raise InterchangeError(f"{files[0]} and the files with it hold no sequence; give the dataset's files")


def _size(scalar: Any) -> int:
    return 0 if scalar.values is None else len(scalar.values)


def _positions(scalar: Any, missing: int) -> int:
    return _size(scalar) - missing


def _one_length(odd: str | None, where: str, size: int, length: int) -> str | None:
    """Only the last sequence may be shorter; returns the place of a shorter one."""
    wrong = odd or (where if size > length or size < 1 else None)
    if wrong:
        raise InterchangeError(
            f"{wrong} does not have {length} positions like the first one, and a cache's blocks are of one length; "
            "give --block-length N to keep the first N positions of every sequence that has them"
        )
    return where if size < length else None


def _take(found: Sequences, digest: Any, where: str, tokens: NDArray[np.int64]) -> None:
    largest, smallest = int(tokens.max()), int(tokens.min())
    if smallest < 0 or largest >= 1 << 31:
        wrong = smallest if smallest < 0 else largest
        raise InterchangeError(f"{where} has the token {wrong}, which no tokenizer has; write the file again")
    if largest > found.largest[0]:
        found.largest = (largest, where)
    found.num_tokens += tokens.size
    digest.update(tokens.astype("<i4").tobytes())


def _numbers(where: str, name: str, values: Any) -> NDArray[np.int64]:
    if values is None or values.null_count:
        raise InterchangeError(f"{where} has a null in column {name!r}; leave such sequences out of the files")
    return np.asarray(values.to_numpy(zero_copy_only=False)).astype(np.int64)


def _byte_rows(where: str, name: str, values: Any) -> NDArray[np.uint8]:
    """uint8 [positions, bytes] of a list of byte lists."""
    if values is None or values.null_count:
        raise InterchangeError(f"{where} has a null in column {name!r}; leave such sequences out of the files")
    sizes = np.diff(values.offsets.to_numpy())
    flat = _numbers(where, name, values.flatten())
    if sizes.size == 0 or (sizes != sizes[0]).any() or flat.size != sizes.sum():
        raise InterchangeError(f"{where} has positions of unequal numbers of bytes in column {name!r}; it is damaged")
    if flat.size and (flat.min() < 0 or flat.max() > 255):
        raise InterchangeError(f"{where} has a number outside 0 to 255 in column {name!r}; it must hold bytes")
    return flat.astype(np.uint8).reshape(sizes.size, int(sizes[0]))
