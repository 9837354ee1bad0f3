"""The two flatbuffers of an Arrow IPC file that say where its bytes are, read with every offset checked.

pyarrow decodes whole batches and believes the lengths it finds; a reader that must refuse a decompression bomb has to
see them first. Layout: https://flatbuffers.dev/internals and Arrow's `File.fbs` and `Message.fbs`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

RECORD_BATCH_HEADER = 3
ZSTD, WHOLE_BUFFERS = 1, 0


class FlatbufferError(ValueError):
    """The bytes are no such flatbuffer."""


@dataclass(frozen=True)
class Block:
    """Where a record batch lies: offset of its metadata (with their prefix of 8 bytes), and both lengths in bytes."""

    offset: int
    metadata_bytes: int
    body_bytes: int


@dataclass(frozen=True)
class Batch:
    """A record batch's metadata: rows, (length, nulls) of every field node, (offset, length) of every buffer."""

    rows: int
    nodes: list[tuple[int, ...]]
    buffers: list[tuple[int, ...]]


class Table:
    """One table of a flatbuffer. Fields are named by their slot; an absent field has its default."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data, self._position = data, position
        self._vtable = position - self._unpack("<i", position)[0]
        self._vtable_bytes = self._unpack("<H", self._vtable)[0]

    @classmethod
    def root(cls, data: bytes) -> Table:
        if len(data) < 4:
            raise FlatbufferError("too short")
        return cls(data, int.from_bytes(data[:4], "little"))

    def scalar(self, slot: int, format_: str, default: int = 0) -> int:
        position = self._field(slot)
        return default if position is None else int(self._unpack(format_, position)[0])

    def table(self, slot: int) -> Table | None:
        position = self._field(slot)
        return None if position is None else Table(self._data, self._follow(position))

    def structs(self, slot: int, format_: str) -> list[tuple[int, ...]]:
        """A vector of structs."""
        position = self._field(slot)
        if position is None:
            return []
        begin = self._follow(position)
        (count,) = self._unpack("<I", begin)
        size = struct.calcsize(format_)
        if count * size > len(self._data):
            raise FlatbufferError("a vector is longer than the flatbuffer")
        return [self._unpack(format_, begin + 4 + index * size) for index in range(count)]

    def _field(self, slot: int) -> int | None:
        place = 4 + 2 * slot
        if place + 2 > self._vtable_bytes:
            return None
        (offset,) = self._unpack("<H", self._vtable + place)
        return self._position + offset if offset else None

    def _follow(self, position: int) -> int:
        return position + int(self._unpack("<I", position)[0])

    def _unpack(self, format_: str, position: int) -> tuple[Any, ...]:
        # `unpack_from` would take a negative position from the end.
        if not 0 <= position <= len(self._data) - struct.calcsize(format_):
            raise FlatbufferError("an offset points outside the flatbuffer")
        return struct.unpack_from(format_, self._data, position)


def footer_blocks(footer: bytes) -> list[Block]:
    """The record batches of a file's footer, in order. Raises FlatbufferError."""
    table = Table.root(footer)
    if table.structs(2, "<qi4xq"):
        raise FlatbufferError("dictionaries")
    return [Block(*block) for block in table.structs(3, "<qi4xq")]


def record_batch(message: bytes, body_bytes: int) -> Batch:
    """The metadata of a record batch with zstd buffers. Raises FlatbufferError when it is anything else."""
    table = Table.root(message)
    header = table.table(2)
    if table.scalar(1, "<B") != RECORD_BATCH_HEADER or header is None or table.scalar(3, "<q") != body_bytes:
        raise FlatbufferError("not the record batch that the footer names")
    compression = header.table(3)
    if compression is None or (compression.scalar(0, "<b"), compression.scalar(1, "<b")) != (ZSTD, WHOLE_BUFFERS):
        raise FlatbufferError("not compressed with zstd")
    return Batch(header.scalar(0, "<q"), header.structs(1, "<qq"), header.structs(2, "<qq"))
