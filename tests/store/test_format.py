"""Literal bytes of a tiny shard of each container: what FORMAT.md describes, written and read.

The zip is put together here from FORMAT.md's words. constraints.txt pins the libraries that compress; should another
version write other bytes, reading these must still give the same numbers.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path

import google_crc32c
import numpy as np

from logitcache.store.container import open_container, write_container
from tests.store.containers import check

CHUNKS = [
    {"ids": np.array([3, 0, 70_000]), "counts": np.array([1, 2])},
    {"ids": np.array([5]), "counts": np.zeros(0, dtype=np.int64)},
]
ATTRIBUTES = {"format_version": 1, "role": "shard"}
SIZES = {"ids": [3, 1], "counts": [2, 0]}
# Each a PCodec stream of W integers, zeros after the chunk's own, and the stream's CRC-32C.
STREAMS = {
    "counts/c/0/0": "70636f210281030701000000100008000802008637a54e",
    "counts/c/1/0": "70636f210281030701000000100000000000f5041a34",
    "ids/c/0/0": "70636f2102c103010200000022001000000040002e220000001a0c0097e29a40",
    "ids/c/1/0": "70636f2102c10301020000001000000000001800050000a114e808",
}


def array_json(width: int, data_type: str) -> bytes:
    fields = {
        "shape": [2, width],
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, width]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "numcodecs.pcodec", "configuration": {"level": 8}}, {"name": "crc32c"}],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    return json.dumps(fields, indent=2).encode()


def literal_zip() -> bytes:
    """Local headers with their members in code-point order, then the directory, then its end record."""
    group = {"attributes": {**ATTRIBUTES, "sizes": SIZES}, "zarr_format": 3, "node_type": "group"}
    members = {name: bytes.fromhex(stream) for name, stream in STREAMS.items()}
    members |= {"zarr.json": json.dumps(group, indent=2).encode()}
    members |= {"ids/zarr.json": array_json(3, "uint32"), "counts/zarr.json": array_json(2, "uint16")}
    body, directory = b"", b""
    for name, data in sorted(members.items()):
        # Version 2.0, no flags, stored, 1980-01-01 00:00, CRC-32, two sizes, length of the name, no extra field.
        common = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0x21, zlib.crc32(data), len(data), len(data), len(name), 0)
        directory += b"PK\1\2" + struct.pack("<BB", 20, 3) + common
        directory += struct.pack("<HHHII", 0, 0, 0, 0o600 << 16, len(body)) + name.encode()
        body += b"PK\3\4" + common + name.encode() + data
    ends = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return body + directory + b"PK\5\6" + ends


LITERAL_ARROW = base64.b64decode(
    """
QVJST1cxAAD/////IAIAABAAAAAAAAoADgAGAAUACAAKAAAAAAEEABAAAAAAAAoADAAAAAQACAAKAAAAIAEAAAQAAAABAAAADAAAAAgADAAEAAgA
CAAAAPQAAAAEAAAA5QAAAHsiYXR0cmlidXRlcyI6eyJmb3JtYXRfdmVyc2lvbiI6MSwicm9sZSI6InNoYXJkIn0sImNoZWNrc3VtIjoiYzVhYzA0
OTI3NzE3ZjE5ZWVmYjk4MmU3YmVjZjMxOTI2NzYzZjA3NTEyYzMwYWU5ODQzODgzZmMyYmQ0ZjhlOSIsImNyYzMyYyI6eyJjb3VudHMiOlsyOTkz
MTQ4MzA1LDBdLCJpZHMiOls3MjY5NDI5NDMsMzk5MzAzMDc5Nl19LCJzaXplcyI6eyJjb3VudHMiOlsyLDBdLCJpZHMiOlszLDFdfX0AAAAKAAAA
bG9naXRjYWNoZQAAAgAAAGAAAAAEAAAAfP///wAAABUUAAAAHAAAAAQAAAABAAAAFAAAAAYAAABjb3VudHMAAKz///+o////AAAAAhAAAAAYAAAA
BAAAAAAAAAAEAAAAaXRlbQAAAACa////EAAAANT///8AAAAVFAAAABwAAAAEAAAAAQAAACQAAAADAAAAaWRzAAQABAAEAAAAEAAUAAgAAAAHAAwA
AAAQABAAAAAAAAACEAAAABwAAAAEAAAAAAAAAAQAAABpdGVtAAAGAAgABAAGAAAAIAAAAAAAAAD/////MAEAABQAAAAAAAAADAAYAAYABQAIAAwA
DAAAAAADBAAcAAAAiAAAAAAAAAAAAAAADAAeABAABAAIAAwADAAAALAAAAAkAAAAGAAAAAEAAAAAAAAAAAAAAAAABgAIAAcABgAAAAAAAAEIAAAA
AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAIQAAAAAAAAAoAAAAAAAAAAAAAAAAAAAAKAAAAAAAAAAdAAAAAAAAAEgAAAAAAAAAAAAAAAAAAABIAAAA
AAAAACEAAAAAAAAAcAAAAAAAAAAAAAAAAAAAAHAAAAAAAAAAFQAAAAAAAAAAAAAABAAAAAEAAAAAAAAAAAAAAAAAAAADAAAAAAAAAAAAAAAAAAAA
AQAAAAAAAAAAAAAAAAAAAAIAAAAAAAAAAAAAAAAAAAAQAAAAAAAAACi1L/0gEIEAAAAAAAAAAAAAAwAAAAAAAAAAAAAAAAAADAAAAAAAAAAotS/9
IAxhAAADAAAAAAAAAHARAQAAAAAQAAAAAAAAACi1L/0gEIEAAAAAAAAAAAAAAgAAAAAAAAAAAAAAAAAABAAAAAAAAAAotS/9IAQhAAABAAIAAAAA
/////zABAAAUAAAAAAAAAAwAGAAGAAUACAAMAAwAAAAAAwQAHAAAAGAAAAAAAAAAAAAAAAwAHgAQAAQACAAMAAwAAACwAAAAJAAAABgAAAABAAAA
AAAAAAAAAAAAAAYACAAHAAYAAAAAAAABCAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAACEAAAAAAAAAKAAAAAAAAAAAAAAAAAAAACgAAAAAAAAA
FQAAAAAAAABAAAAAAAAAAAAAAAAAAAAAQAAAAAAAAAAZAAAAAAAAAGAAAAAAAAAAAAAAAAAAAABgAAAAAAAAAAAAAAAAAAAAAAAAAAQAAAABAAAA
AAAAAAAAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEAAAAAAAAAAotS/9IBCBAAAAAAAAAAAA
AAEAAAAAAAAAAAAAAAAAAAQAAAAAAAAAKLUv/SAEIQAABQAAAAAAABAAAAAAAAAAKLUv/SAQRQAAEAAAAQAywAIAAAAAAAAA/////wAAAAAQAAAA
DAAUAAYACAAMABAADAAAAAAABABUAAAAQAAAAAQAAAACAAAAMAIAAAAAAAA4AQAAAAAAAIgAAAAAAAAA8AMAAAAAAAA4AQAAAAAAAGAAAAAAAAAA
AAAAAAAAAAAAAAoADAAAAAQACAAKAAAAIAEAAAQAAAABAAAADAAAAAgADAAEAAgACAAAAPQAAAAEAAAA5QAAAHsiYXR0cmlidXRlcyI6eyJmb3Jt
YXRfdmVyc2lvbiI6MSwicm9sZSI6InNoYXJkIn0sImNoZWNrc3VtIjoiYzVhYzA0OTI3NzE3ZjE5ZWVmYjk4MmU3YmVjZjMxOTI2NzYzZjA3NTEy
YzMwYWU5ODQzODgzZmMyYmQ0ZjhlOSIsImNyYzMyYyI6eyJjb3VudHMiOlsyOTkzMTQ4MzA1LDBdLCJpZHMiOls3MjY5NDI5NDMsMzk5MzAzMDc5
Nl19LCJzaXplcyI6eyJjb3VudHMiOlsyLDBdLCJpZHMiOlszLDFdfX0AAAAKAAAAbG9naXRjYWNoZQAAAgAAAGAAAAAEAAAAfP///wAAABUUAAAA
HAAAAAQAAAABAAAAFAAAAAYAAABjb3VudHMAAKz///+o////AAAAAhAAAAAYAAAABAAAAAAAAAAEAAAAaXRlbQAAAACa////EAAAANT///8AAAAV
FAAAABwAAAAEAAAAAQAAACQAAAADAAAAaWRzAAQABAAEAAAAEAAUAAgAAAAHAAwAAAAQABAAAAAAAAACEAAAABwAAAAEAAAAAAAAAAQAAABpdGVt
AAAGAAgABAAGAAAAIAAAAGACAABBUlJPVzE=
"""
)


def test_zarr_is_written(tmp_path: Path) -> None:
    write_container("zarr", tmp_path / "c", CHUNKS, ATTRIBUTES)
    assert (tmp_path / "c").read_bytes() == literal_zip()


def test_zarr_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr.zip"
    path.write_bytes(literal_zip())
    container = open_container(path)
    assert (container.attributes, container.sizes) == (ATTRIBUTES, SIZES)
    check(container, CHUNKS)


def test_the_streams_checksums() -> None:
    """The standard CRC-32C (Castagnoli), little-endian: its check value, and those of the literal streams."""
    assert google_crc32c.value(b"123456789") == 0xE3069283
    for stream in map(bytes.fromhex, STREAMS.values()):
        assert google_crc32c.value(stream[:-4]) == struct.unpack("<I", stream[-4:])[0]


def test_arrow_is_written(tmp_path: Path) -> None:
    write_container("arrow", tmp_path / "c", CHUNKS, ATTRIBUTES)
    assert (tmp_path / "c").read_bytes() == LITERAL_ARROW


def test_arrow_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.arrow"
    path.write_bytes(LITERAL_ARROW)
    container = open_container(path)
    assert (container.attributes, container.sizes) == (ATTRIBUTES, SIZES)
    check(container, CHUNKS)


def test_arrow_byte_for_byte() -> None:
    """The places FORMAT.md speaks of: magic, metadata with their checksums, and one plane's compressed integers."""
    assert LITERAL_ARROW[:6] == LITERAL_ARROW[-6:] == b"ARROW1"
    begin = LITERAL_ARROW.index(b'{"attributes"')
    stored = LITERAL_ARROW[begin : LITERAL_ARROW.index(b"\0", begin)]
    metadata = json.loads(stored)
    crcs = {name: [google_crc32c.value(plane.astype(kind).tobytes()) for plane in planes] for name, kind, planes in (
        ("ids", "<u4", [chunk["ids"] for chunk in CHUNKS]), ("counts", "<u2", [chunk["counts"] for chunk in CHUNKS])
    )}  # fmt: skip
    assert {**metadata, "checksum": ""} == {"attributes": ATTRIBUTES, "sizes": SIZES, "crc32c": crcs, "checksum": ""}
    # Length 12, a zstd frame (magic, one raw block) of 3, 0 and 70,000 as uint32.
    values = bytes.fromhex("0c0000000000000028b52ffd200c610000030000000000000070110100")
    assert LITERAL_ARROW.count(values) == 1
