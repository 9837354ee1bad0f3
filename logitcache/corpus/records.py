"""Records of JSONL, Parquet and Arrow files, and what their fields must be: the place of every error."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.corpus.columnar import iter_batches
from logitcache.corpus.sources import CorpusFile, unreadable
from logitcache.errors import CorpusError

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, eq=False)
class Record:
    """One line of a JSONL file or row of a Parquet or Arrow file.

    Args:
        place: file and line or row, for messages.
        names: the fields that are read, by what they hold.
        values: what is in them; a column of lists of numbers gives numpy arrays.
    """

    place: str
    names: Mapping[str, str]
    values: Mapping[str, Any]

    def text(self, role: str) -> str:
        """A field that must be a string. Raises CorpusError."""
        value = self.values[role]
        if not isinstance(value, str):
            raise self.wrong(role, "a string")
        return encodable(value, self.place)

    def messages(self) -> list[dict[str, Any]]:
        """The conversation. Raises CorpusError unless it is a list of objects with a role and text each."""
        value = self.values["messages"]
        if not isinstance(value, list) or not value:
            raise self.wrong("messages", "a list of messages", "" if value else "empty")
        for number, message in enumerate(value):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise CorpusError(
                    f"{self.place} has a message {number} in field {self.names['messages']!r} that is no object with "
                    "a role; repair the record"
                )
            # An assistant that calls tools says nothing; tables hold what a message lacks as None.
            if all(value is None for key, value in message.items() if key not in ("role", "name")):
                raise CorpusError(
                    f"{self.place} has a message {number} in field {self.names['messages']!r} that has no content; "
                    "repair the record"
                )
            # Some templates would write the brackets and quotes of a list of parts as if they were said.
            if not isinstance(content := message.get("content"), str | None):
                raise CorpusError(
                    f"{self.place} has a message {number} in field {self.names['messages']!r} whose content is "
                    f"{json_kind(content)}, not text; write it as one string, of a list of parts the text of them all"
                )
        return value

    def integers(self, role: str) -> NDArray[Any]:
        """A field that must be a flat list of whole numbers, of any integer type. Raises CorpusError."""
        value = self.values[role]
        if isinstance(value, list) and role == "ids" and bool in map(type, value):
            # numpy would make a 1 of True among numbers.
            raise self.wrong(role, "a list of whole numbers", "a list with true or false in it")
        if isinstance(value, list):
            try:
                value = np.array(value) if value else np.zeros(0, dtype=np.int64)
            except (ValueError, OverflowError):
                value = None
        kinds = "biu" if role == "mask" else "iu"
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            raise self.wrong(role, "a list of whole numbers", "a list with fractions")
        if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in kinds:
            raise self.wrong(role, "a list of whole numbers")
        return value

    def wrong(self, role: str, wanted: str, found: str = "") -> CorpusError:
        """What to say of a field of another type."""
        found = found or json_kind(self.values[role])
        return CorpusError(
            f"{self.place} has a field {self.names[role]!r} that is {found}, not {wanted}; choose another {role} "
            "field or repair the record"
        )


def iter_records(files: Iterable[CorpusFile], names: Mapping[str, str]) -> Iterator[Record]:
    """Records of `files` in order, streamed, with the fields `names` (what they hold: name).

    Raises:
        CorpusError: a file cannot be read or is plain text, or a record lacks a field; the message gives the file and
            the line or row.
    """
    for file in files:
        try:
            if file.kind == "plain":
                fields = " and ".join(map(repr, names.values()))
                raise CorpusError(
                    f"{file} is plain text and has no fields {fields}; give JSONL, Parquet or Arrow files"
                )
            yield from (_of_lines if file.kind == "jsonl" else _of_rows)(file, names)
        except OSError as error:
            raise unreadable(str(file), error) from error


def iter_objects(file: CorpusFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each JSON object of a JSONL file, gzipped or not, with its place. Blank lines are skipped. Raises CorpusError."""
    opener = gzip.open if file.path.name.lower().endswith(".gz") else open
    try:
        with opener(file.path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield f"{file}:{number}", _object(line, f"{file}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{file} is not a whole gzip file ({error}); fetch or compress it again") from error


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{place} is not UTF-8 at byte {error.start} of the line; {utf8_advice(error)}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        what = "nested too deeply"
        if isinstance(error, json.JSONDecodeError):
            # Some of json's reasons end with "at".
            what = f"{error.msg.removesuffix(' at')}, at character {error.pos + 1} of the line"
        raise CorpusError(f"{place} is not a JSON object ({what}); write one object on each line") from error
    if not isinstance(record, dict):
        raise CorpusError(f"{place} holds a JSON {type(record).__name__}; write one object on each line")
    return record


def picked(record: Mapping[str, Any], names: Mapping[str, str], place: str) -> dict[str, Any]:
    """The fields `names` of a JSON object, by what they hold. Raises CorpusError when one is missing."""
    for role, name in names.items():
        if name not in record:
            held = ", ".join(map(repr, record)) or "no fields"
            raise CorpusError(f"{place} has no field {name!r}; it has {held}; choose one of them as the {role} field")
    return {role: record[name] for role, name in names.items()}


def _of_lines(file: CorpusFile, names: Mapping[str, str]) -> Iterator[Record]:
    for place, record in iter_objects(file):
        yield Record(place, names, picked(record, names, place))


def _of_rows(file: CorpusFile, names: Mapping[str, str]) -> Iterator[Record]:
    index = 0
    for batch in iter_batches(file, names):
        columns = {role: batch.column(name) for role, name in names.items()}
        for row in range(batch.num_rows):
            place = f"{file} row {index}"
            yield Record(place, names, {role: cell(column[row], place) for role, column in columns.items()})
            index += 1


def cell(scalar: Any, place: str) -> Any:
    """A cell as a Python value, or a list of numbers without gaps as an array. Raises CorpusError for broken UTF-8."""
    import pyarrow as pa

    values = getattr(scalar, "values", None)
    if isinstance(values, pa.Array) and not values.null_count and not values.type.num_fields:
        found: NDArray[Any] = values.to_numpy(zero_copy_only=False)
        if found.dtype.kind in "biu":
            return found
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{place} is not UTF-8 at byte {error.start}; write the file again as UTF-8") from error


def utf8_advice(error: UnicodeDecodeError) -> str:
    """How to make UTF-8 of bytes that are none; UTF-16 is known by its first two."""
    if error.object.startswith(_UTF_16):
        return "it is UTF-16, so convert the file to UTF-8 with `iconv -f utf-16 -t utf-8`"
    return "convert the file to UTF-8, for example with `iconv -f latin1 -t utf-8`"


def encodable(text: str, place: str) -> str:
    """The text. Raises CorpusError for half a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{place} holds half a surrogate pair at character {error.start}, which is not text; repair the line"
        ) from error
    return text


def json_kind(value: object) -> str:
    """What JSON calls a value."""
    names = {
        type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "an array", str: "a string",
        np.ndarray: "an array",
    }  # fmt: skip
    return names.get(type(value), "an object")
