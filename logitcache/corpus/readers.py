"""Files -> documents: plain text, JSONL (also gzipped), Parquet and Arrow, streamed, with the place of every error."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import Any

from logitcache.corpus.columnar import iter_batches
from logitcache.corpus.documents import Document, cut_pieces
from logitcache.corpus.records import cell, encodable, iter_objects, json_kind, picked, utf8_advice
from logitcache.corpus.sources import CorpusFile, unreadable
from logitcache.errors import CorpusError

_READ_BYTES = 1 << 22


def iter_documents(files: Iterable[CorpusFile], text_field: str = "text") -> Iterator[Document]:
    """Documents of `files` in order, streamed.

    A plain-text file is one document (in pieces, where it is long); JSONL, Parquet and Arrow files hold one document a
    record, in `text_field`. Blank JSONL lines are no records; null cells of columns are empty documents. Bytes are
    UTF-8 (a byte-order mark is dropped) and never repaired silently.

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
                yield from _columns(file, text_field)
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
                raise CorpusError(f"{file} is not UTF-8 at byte offset {offset}; {utf8_advice(error)}") from error
            yield text.removeprefix("\ufeff") if consumed == 0 else text
            consumed += len(chunk)
            if not chunk:
                return


def _jsonl(file: CorpusFile, text_field: str) -> Iterator[Document]:
    for index, (place, record) in enumerate(iter_objects(file)):
        yield Document(_record_text(record, place, text_field), str(file), index)


def _record_text(record: dict[str, Any], place: str, text_field: str) -> str:
    text = picked(record, {"text": text_field}, place)["text"]
    if not isinstance(text, str):
        raise CorpusError(
            f"{place} has a field {text_field!r} that is {json_kind(text)}, not a string; "
            "choose another text field or repair the line"
        )
    return encodable(text, place)


def _columns(file: CorpusFile, text_field: str) -> Iterator[Document]:
    index = 0
    for batch in iter_batches(file, {"text": text_field}):
        for value in batch.column(text_field):
            yield Document(cell(value, f"{file} row {index}") or "", str(file), index)
            index += 1
