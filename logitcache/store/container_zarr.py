"""The `zarr` container: a Zarr v3 group inside an uncompressed, byte-reproducible zip.

Every plane is an array [chunks, longest chunk]; row c holds chunk c's integers and then zeros. PCodec compresses,
crc32c comes last so that no flipped bit survives (the zip's own checksums cover the metadata). zarr writes; reading
takes a chunk's bytes straight from the file, because zarr's pipeline costs more than the decompression.
"""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
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
from logitcache.store.files import strict_json

PCODEC_LEVEL = 8
CODECS = [{"name": "numcodecs.pcodec", "configuration": {"level": PCODEC_LEVEL}}, {"name": "crc32c"}]
CRC_BYTES = 4
# Zip stores a time of change; a fixed one makes equal content equal bytes.
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
# A member's local header: signature, fields that the directory repeats, lengths of its name and its extra field.
LOCAL_HEADER = struct.Struct("<4s22xHH")


def write(path: Path, chunks: Sequence[Mapping[str, Plane]], attributes: Mapping[str, Any]) -> None:
    """See `write_container`."""
    import zarr
    from zarr.storage import MemoryStore

    _expect_numcodecs()
    members: dict[str, Any] = {}
    sizes = {name: [int(chunk[name].size) for chunk in chunks] for name in chunks[0]}
    group = zarr.create_group(store=MemoryStore(members), attributes={**attributes, "sizes": sizes})
    for name, dtype in dtypes_of(chunks).items():
        _write_plane(group, name, dtype, [chunk[name] for chunk in chunks])
    check_metadata_bytes(len(members["zarr.json"].to_bytes()))
    check_metadata_bytes(sum(len(name) + 46 for name in members), MAX_DIRECTORY_BYTES)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, ZIP_EPOCH), members[name].to_bytes())


def _expect_numcodecs() -> None:
    """zarr warns that numcodecs' codecs are outside the Zarr v3 specification; FORMAT.md says which we use.

    A filter that stays, because `catch_warnings` would race with other threads.
    """
    warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")


def _write_plane(group: Any, name: str, dtype: np.dtype[Any], parts: Sequence[Plane]) -> None:
    from zarr.codecs import Crc32cCodec
    from zarr.codecs.numcodecs import PCodec

    width = max(1, *(part.size for part in parts))
    array = group.create_array(
        name,
        shape=(len(parts), width),
        chunks=(1, width),
        dtype=dtype,
        fill_value=0,
        serializer=PCodec(level=PCODEC_LEVEL),
        compressors=[Crc32cCodec()],
        # A chunk of zeros must exist like any other: an absent chunk is damage, not zeros.
        config={"write_empty_chunks": True},
    )
    for index, part in enumerate(parts):
        row = np.zeros((1, width), dtype=dtype)
        row[0, : part.size] = part
        array[index : index + 1] = row


class ZarrContainer(Container):
    """Reads what `write` wrote."""

    def _open(self) -> tuple[dict[str, Any], Sizes]:
        with zipfile.ZipFile(_Directory(self.path)) as archive:
            names = archive.namelist()
            self._members = {info.filename: info for info in archive.infolist()}
            attributes = self._metadata(archive, "zarr.json")["attributes"]
            sizes = {str(name): list(row) for name, row in attributes.pop("sizes").items()}
            self._dtypes = {
                name: self._dtype(self._metadata(archive, f"{name}/zarr.json"), row) for name, row in sizes.items()
            }
        chunks = [f"{name}/c/{index}/0" for name, row in sizes.items() for index in range(len(row))]
        if sorted(names) != sorted([*chunks, *(f"{name}/zarr.json" for name in sizes), "zarr.json"]):
            raise self._damaged("its members are not those its metadata names")
        return attributes, sizes

    def stored_bytes(self, name: str) -> int:
        return sum(self._members[f"{name}/c/{chunk}/0"].file_size for chunk in range(self.num_chunks))

    def _read(self, name: str, chunk: int, size: int, memory: Memory) -> Plane:
        import google_crc32c
        from pcodec import standalone

        packed, checksum = self._member(f"{name}/c/{chunk}/0")
        if google_crc32c.value(packed) != int.from_bytes(checksum, "little"):
            raise self._damaged_plane(name, chunk, "differs from its checksum")
        row = memory.scratch(f"plane {name}", max(1, *self.sizes[name]), self._dtypes[name])
        progress = standalone.simple_decompress_into(packed, row)
        if not progress.finished or progress.n_processed != row.size:
            raise self._damaged_plane(name, chunk, f"does not hold {row.size} numbers")
        if row[size:].any():
            raise self._damaged_plane(name, chunk, "holds data beyond its end")
        return row[:size]

    def _member(self, name: str) -> tuple[bytes, bytes]:
        """A member's bytes and its checksum's, from the place the directory gives and only where its header agrees."""
        info = self._members[name]
        encoded = name.encode()
        begin = LOCAL_HEADER.size + len(encoded)
        found = self._bytes(info.header_offset, begin)
        header = (b"PK\3\4", len(encoded), 0)
        if LOCAL_HEADER.unpack_from(found) != header or found[LOCAL_HEADER.size :] != encoded:
            raise self._damaged(f"member {name} is not where the directory says")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise self._damaged(f"member {name} is compressed")
        start, count = info.header_offset + begin, info.file_size - CRC_BYTES
        if count < 0:
            raise ValueError("there is no room for a checksum")
        # Read apart, as cutting them from one another would copy megabytes.
        return self._bytes(start, count), self._bytes(start + count, CRC_BYTES)

    def _metadata(self, archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > MAX_METADATA_BYTES:
            raise self._damaged(f"member {name} is compressed or too large")
        return strict_json(archive.read(info))

    def _dtype(self, metadata: dict[str, Any], sizes: list[int]) -> np.dtype[Any]:
        """The type of an array whose metadata, field for field, is what this format allows."""
        shape = [len(sizes), max([1, *sizes])]
        expected = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, shape[1]]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
        }
        if any(metadata.get(field) != value for field, value in expected.items()):
            raise self._damaged("an array's shape differs from its chunk sizes")
        if metadata.get("codecs") != CODECS or metadata.get("data_type") not in ALLOWED_DTYPES:
            raise self._damaged("an array uses a codec or type that this format does not allow")
        if metadata.get("storage_transformers"):
            raise self._damaged("an array uses a codec or type that this format does not allow")
        return np.dtype(metadata["data_type"])


class _Directory(io.FileIO):
    """A zip for `zipfile`, which would read a directory of any size that the file claims."""

    def read(self, size: int | None = -1, /) -> Any:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("the directory is too large")
        return super().read(size)
