"""The `arrow` container: an Arrow IPC file of one record batch per chunk, every plane a column of one list.

Any Arrow reader opens it. Arrow checks nothing by itself, so the schema's metadata, itself checksummed, hold the
sizes and a crc32c of every plane's decoded bytes. pyarrow writes and reads the schema; buffers are decompressed here,
after their lengths are compared with the sizes, because Arrow would allocate whatever a buffer claims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.codec import Memory
from logitcache.store.container_file import (
    ALLOWED_DTYPES,
    MAX_DIRECTORY_BYTES,
    MAX_METADATA_BYTES,
    Container,
    Plane,
    Sizes,
    check_metadata_bytes,
    dtypes_of,
)
from logitcache.store.files import canonical_json, digest, sealed, strict_json
from logitcache.store.flatbuffer import Batch, Block, footer_blocks, record_batch

# Higher levels are slower and on ids no smaller: they are nearly random numbers in 16 or 32 bits.
ZSTD_LEVEL = 1
METADATA_KEY = b"logitcache"
MAGIC = b"ARROW1"
CONTINUATION = b"\xff\xff\xff\xff"
# Before a compressed buffer: the int64 length it decompresses to.
LENGTH_BYTES = 8
BUFFERS_PER_PLANE = 4


def write(path: Path, chunks: Sequence[Mapping[str, Plane]], attributes: Mapping[str, Any]) -> None:
    """See `write_container`."""
    import pyarrow

    dtypes = dtypes_of(chunks)
    narrow = [{name: _little_endian(chunk[name], dtype) for name, dtype in dtypes.items()} for chunk in chunks]
    metadata = canonical_json(sealed({"attributes": dict(attributes), **_sizes_and_checksums(narrow)}))
    check_metadata_bytes(len(metadata))
    schema = pyarrow.schema([_field(name, dtype) for name, dtype in dtypes.items()], {METADATA_KEY: metadata})
    compression = pyarrow.Codec("zstd", compression_level=ZSTD_LEVEL)
    options = pyarrow.ipc.IpcWriteOptions(compression=compression, use_threads=False)
    with path.open("wb") as file, pyarrow.ipc.new_file(file, schema, options=options) as writer:
        for planes in narrow:
            columns = [_column(plane, schema.field(name).type) for name, plane in planes.items()]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))


def _sizes_and_checksums(chunks: Sequence[Mapping[str, Plane]]) -> dict[str, dict[str, list[int]]]:
    import google_crc32c

    names = list(chunks[0])
    return {
        "sizes": {name: [int(chunk[name].size) for chunk in chunks] for name in names},
        "crc32c": {name: [google_crc32c.value(chunk[name].tobytes()) for chunk in chunks] for name in names},
    }


def _little_endian(plane: Plane, dtype: np.dtype[Any]) -> Plane:
    return np.ascontiguousarray(plane, dtype=dtype.newbyteorder("<"))


def _field(name: str, dtype: np.dtype[Any]) -> Any:
    import pyarrow

    item = pyarrow.field("item", pyarrow.from_numpy_dtype(dtype), nullable=False)
    return pyarrow.field(name, pyarrow.large_list(item), nullable=False)


def _column(plane: Plane, type_: Any) -> Any:
    import pyarrow

    offsets = pyarrow.array([0, plane.size], pyarrow.int64())
    return pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(plane), type=type_)


class ArrowContainer(Container):
    """Reads what `write` wrote."""

    def _open(self) -> tuple[dict[str, Any], Sizes]:
        import pyarrow

        footer = self._footer()
        with pyarrow.OSFile(str(self.path)) as file:
            schema = pyarrow.ipc.open_file(file).schema
        if set(schema.metadata) != {METADATA_KEY} or len(schema.metadata[METADATA_KEY]) > MAX_METADATA_BYTES:
            raise self._damaged("its schema has no metadata of this format")
        metadata = strict_json(schema.metadata[METADATA_KEY])
        if metadata.pop("checksum") != digest(metadata) or set(metadata) != {"attributes", "sizes", "crc32c"}:
            raise self._damaged("its metadata differ from their checksum")
        sizes: Sizes = {name: metadata["sizes"].pop(name) for name in schema.names}
        self._checksums = metadata["crc32c"]
        self._dtypes = {field.name: _dtype_of(field.type) for field in schema}
        self._order = {name: index for index, name in enumerate(schema.names)}
        fields = [_field(name, dtype) for name, dtype in self._dtypes.items()]
        if metadata["sizes"] or not schema.equals(pyarrow.schema(fields)):
            raise self._damaged("its columns are not those its metadata name, or of another type")
        self._blocks = footer_blocks(footer)
        if any(len(rows[name]) != len(self._blocks) for rows in (sizes, self._checksums) for name in sizes):
            raise self._damaged("it does not hold one record batch for every chunk")
        return metadata["attributes"], sizes

    def _footer(self) -> bytes:
        """The flatbuffer before the closing int32 length and magic."""
        closing = 4 + len(MAGIC)
        end = self.num_bytes - closing
        tail = self._bytes(end, closing)
        count = int.from_bytes(tail[:4], "little", signed=True)
        if tail[4:] != MAGIC or self._bytes(0, len(MAGIC)) != MAGIC or not 0 < count <= MAX_DIRECTORY_BYTES:
            raise self._damaged("it is no Arrow file")
        return self._bytes(end - count, count)

    def stored_bytes(self, name: str) -> int:
        return sum(length for chunk in range(self.num_chunks) for _, length in self._buffers(name, chunk))

    def _buffers(self, name: str, chunk: int) -> list[tuple[int, ...]]:
        """Offset and length of a plane's buffers in its record batch."""
        block = self._blocks[chunk]
        if block.metadata_bytes > MAX_METADATA_BYTES:
            raise self._damaged_plane(name, chunk, "has too much metadata")
        message = self._bytes(block.offset, block.metadata_bytes)
        if message[:4] != CONTINUATION:
            raise self._damaged_plane(name, chunk, "is not where the footer says")
        batch = record_batch(message[8:], block.body_bytes)
        self._check_nodes(batch, chunk)
        first = BUFFERS_PER_PLANE * self._order[name]
        return batch.buffers[first : first + BUFFERS_PER_PLANE]

    def _read(self, name: str, chunk: int, size: int, memory: Memory) -> Plane:
        import google_crc32c

        block = self._blocks[chunk]
        _, offsets, _, values = self._buffers(name, chunk)
        if bytes(self._buffer(block, offsets, 16)) != np.array([0, size], dtype="<i8").tobytes():
            raise self._damaged_plane(name, chunk, "holds data beyond its end")
        data = self._buffer(block, values, size * self._dtypes[name].itemsize)
        if google_crc32c.value(data) != self._checksums[name][chunk]:
            raise self._damaged_plane(name, chunk, "differs from its checksum")
        return np.frombuffer(data, dtype=self._dtypes[name].newbyteorder("<"))

    def _check_nodes(self, batch: Batch, chunk: int) -> None:
        """One list without nulls in every column, as long as the metadata say."""
        nodes = [node for name in self._order for node in ((1, 0), (self.sizes[name][chunk], 0))]
        validities = [length for _, length in batch.buffers[::2]]
        if batch.rows != 1 or batch.nodes != nodes or len(batch.buffers) != 2 * len(nodes) or any(validities):
            raise self._damaged(f"chunk {chunk} is not one list for every plane")

    def _buffer(self, block: Block, place: tuple[int, ...], expected: int) -> Any:
        """A buffer of exactly `expected` bytes once decompressed. Arrow's own memory is used again when it is freed."""
        import pyarrow

        offset, length = place
        if not expected and not length:
            return b""
        if not 0 <= offset <= block.body_bytes - length:
            raise self._damaged("a buffer lies outside its record batch")
        stored = memoryview(self._bytes(block.offset + block.metadata_bytes + offset, length))
        claimed = int.from_bytes(stored[:LENGTH_BYTES], "little", signed=True)
        if claimed != expected:
            raise self._damaged(f"a buffer claims {claimed} bytes instead of {expected}")
        # Raises unless the frame decompresses to exactly that many bytes.
        codec = pyarrow.Codec("zstd")
        return codec.decompress(stored[LENGTH_BYTES:], decompressed_size=expected)


def _dtype_of(type_: Any) -> np.dtype[Any]:
    """The integer type inside a column's type. Raises ValueError for one that the format does not allow."""
    name = str(type_.value_type)
    if name not in ALLOWED_DTYPES:
        raise ValueError(name)
    return np.dtype(name)
