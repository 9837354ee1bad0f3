"""Parquet and Arrow files, streamed in record batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from logitcache.corpus.sources import CorpusFile
from logitcache.errors import CorpusError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1024
_ARROW_FILE = b"ARROW1"


def iter_batches(file: CorpusFile, names: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    """Record batches of a Parquet or Arrow file, with the columns `names` (what they hold: name).

    Of Arrow files both forms are read: files, and streams, which `datasets` writes.

    Raises:
        CorpusError: the file is damaged, or a column is missing.
    """
    with _reading(file):
        yield from (_parquet if file.kind == "parquet" else _arrow)(file, names)


def check_columns(file: CorpusFile, schema: pa.Schema, names: Mapping[str, str]) -> None:
    """Raise CorpusError unless the columns are there and of a type for what they hold."""
    import pyarrow.types as kinds

    for role, name in names.items():
        if name not in schema.names:
            held = ", ".join(map(repr, schema.names)) or "no columns"
            raise CorpusError(f"{file} has no column {name!r}; it has {held}; choose one of them as the {role} field")
        kind = schema.field(name).type
        value = kind.value_type if kinds.is_dictionary(kind) or _is_list(kind) else kind
        if role in ("text", "prompt", "completion"):
            right = not _is_list(kind) and (
                kinds.is_string(value) or kinds.is_large_string(value) or kinds.is_string_view(value)
            )
            wanted = "strings"
        elif role == "messages":
            right, wanted = _is_list(kind) and kinds.is_struct(value), "lists of messages"
        else:
            right = _is_list(kind) and (kinds.is_integer(value) or (role == "mask" and kinds.is_boolean(value)))
            wanted = "lists of integers"
        if not right:
            raise CorpusError(f"{file} has {kind} in column {name!r}, not {wanted}; choose another {role} field")


def _parquet(file: CorpusFile, names: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
        check_columns(file, parquet.schema_arrow, names)
        yield from parquet.iter_batches(batch_size=BATCH_ROWS, columns=list(dict.fromkeys(names.values())))


def _arrow(file: CorpusFile, names: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with pa.OSFile(str(file.path)) as stream:
        begins = stream.read(len(_ARROW_FILE))
        stream.seek(0)
        if begins == _ARROW_FILE:
            whole = pa.ipc.open_file(stream)
            check_columns(file, whole.schema, names)
            batches: Iterator[Any] = (whole.get_batch(number) for number in range(whole.num_record_batches))
        else:
            parts = pa.ipc.open_stream(stream)
            check_columns(file, parts.schema, names)
            batches = iter(parts)
        for batch in batches:
            batch.validate(full=True)
            yield batch


@contextmanager
def _reading(file: CorpusFile) -> Iterator[None]:
    """What pyarrow raises for a damaged or foreign file as a CorpusError that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowSerializationError) as error:
        what = str(error).splitlines()[0].rstrip(".")
        form = "Parquet" if file.kind == "parquet" else "Arrow"
        raise CorpusError(f"{file} is damaged or not {form} ({what}); fetch or write it again") from error


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))
