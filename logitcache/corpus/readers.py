"""Files -> documents: plain text, JSONL (also gzipped) and Parquet, streamed, with the place of every error."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from logitcache.corpus.documents import Document, cut_pieces
from logitcache.corpus.sources import CorpusFile, unreadable
from logitcache.errors import CorpusError

_READ_BYTES = 1 << 22
_UTF8_ADVICE = "convert the file to UTF-8, for example with `iconv -f latin1 -t utf-8`"


def iter_documents(files: Iterable[CorpusFile], text_field: str = "text") -> Iterator[Document]:
    """Documents of `files` in order, streamed.

    A plain-text file is one document (in pieces, where it is long); JSONL and Parquet hold one document a record,
    in `text_field`. Blank JSONL lines are no records; null Parquet rows are empty documents. Bytes are UTF-8
    (a byte-order mark is dropped) and never repaired silently.

    Raises:
        CorpusError: a file cannot be read or decoded, or a record has no such field; the message gives the file and
            the byte, line or row.
    """
    for file in files:
        try:
            if file.kind == "plain":
                yield from _plain(file)
            elif file.kind == "jsonl":
                yield from _jsonl(file, text_field)
            else:
                yield from _parquet(file, text_field)
        except OSError as error:
            raise unreadable(str(file), error) from error


def _plain(file: CorpusFile) -> Iterator[Document]:
    for piece, continued in cut_pieces(_decoded_chunks(file)):
        yield Document(piece, str(file), 0, continued)


def _decoded_chunks(file: CorpusFile) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed = 0
    with open(file.path, "rb") as stream:
        while True:
            chunk = stream.read(_READ_BYTES)
            undecoded = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                offset = consumed - undecoded + error.start
                raise CorpusError(f"{file} is not UTF-8 at byte offset {offset}; {_UTF8_ADVICE}") from error
            yield text.removeprefix("\ufeff") if consumed == 0 else text
            consumed += len(chunk)
            if not chunk:
                return


def _jsonl(file: CorpusFile, text_field: str) -> Iterator[Document]:
    index = 0
    opener = gzip.open if file.path.name.lower().endswith(".gz") else open
    try:
        with opener(file.path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield Document(_record_text(line, f"{file}:{number}", text_field), str(file), index)
                    index += 1
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{file} is not a whole gzip file ({error}); fetch or compress it again") from error


def _record_text(line: bytes, place: str, text_field: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{place} is not UTF-8 at byte {error.start} of the line; {_UTF8_ADVICE}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise CorpusError(f"{place} is not a JSON object ({what}); write one object on each line") from error
    if not isinstance(record, dict):
        raise CorpusError(f"{place} holds a JSON {type(record).__name__}; write one object on each line")
    if text_field not in record:
        raise CorpusError(
            f"{place} has no field {text_field!r}; it has {_listed(record)}; choose one of them as the text field"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise CorpusError(
            f"{place} has a field {text_field!r} that is {_json_kind(text)}, not a string; "
            "choose another text field or repair the line"
        )
    return _encodable(text, place)


def _encodable(text: str, place: str) -> str:
    # JSON can spell half a surrogate pair, which no tokenizer takes.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{place} holds half a surrogate pair at character {error.start}, which is not text; repair the line"
        ) from error
    return text


def _parquet(file: CorpusFile, text_field: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        with pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
            _check_column(file, parquet.schema_arrow, text_field)
            for batch in parquet.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0):
                    yield Document(_scalar_text(value, f"{file} row {index}"), str(file), index)
                    index += 1
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        what = str(error).splitlines()[0].rstrip(".")
        raise CorpusError(f"{file} is damaged or not Parquet ({what}); fetch or write it again") from error


def _check_column(file: CorpusFile, schema: Any, text_field: str) -> None:
    import pyarrow.types as kinds

    if text_field not in schema.names:
        raise CorpusError(
            f"{file} has no column {text_field!r}; it has {_listed(schema.names)}; choose one of them as the text field"
        )
    kind = schema.field(text_field).type
    value_kind = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(value_kind) or kinds.is_large_string(value_kind) or kinds.is_string_view(value_kind)):
        raise CorpusError(f"{file} has {kind} in column {text_field!r}, not strings; choose another text field")


def _scalar_text(value: Any, place: str) -> str:
    try:
        return value.as_py() or ""
    except UnicodeDecodeError as error:
        raise CorpusError(f"{place} is not UTF-8 at byte {error.start}; write the file again as UTF-8") from error


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "no fields"


def _json_kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "an array"}
    return names.get(type(value), "an object")
