"""One immutable file of chunked integer planes: a Zarr v3 group inside an uncompressed, byte-reproducible zip.

Every plane is an array [chunks, longest chunk]; row c holds chunk c's integers and then zeros. PCodec compresses,
crc32c comes last so that no flipped bit survives (the zip's own checksums cover the metadata).
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import DamagedCacheError, TargetsError

PCODEC_LEVEL = 8
ALLOWED_CODECS = [{"name": "numcodecs.pcodec", "configuration": {"level": PCODEC_LEVEL}}, {"name": "crc32c"}]
ALLOWED_DTYPES = ("uint16", "uint32", "uint64")
MAX_METADATA_BYTES = 1 << 20
# Zip stores a time of change; a fixed one makes equal content equal bytes.
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
Plane = NDArray[np.int64]


def write_container(path: Path, chunks: Sequence[Mapping[str, Plane]], attributes: dict[str, Any]) -> None:
    """Write chunks of equal plane names to `path` (truncated if it exists).

    Raises:
        TargetsError: a plane holds a negative number.
    """
    import zarr
    from zarr.storage import MemoryStore

    members: dict[str, Any] = {}
    sizes = {name: [int(chunk[name].size) for chunk in chunks] for name in chunks[0]}
    _expect_numcodecs()
    group = zarr.create_group(store=MemoryStore(members), attributes={**attributes, "sizes": sizes})
    for name in sizes:
        _write_plane(group, name, [chunk[name] for chunk in chunks])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, ZIP_EPOCH), members[name].to_bytes())


def _expect_numcodecs() -> None:
    """zarr warns that numcodecs' codecs are outside the Zarr v3 specification; FORMAT.md says which we use.

    A filter that stays, because `catch_warnings` would race with other threads that open a container.
    """
    warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")


def _write_plane(group: Any, name: str, parts: list[Plane]) -> None:
    from zarr.codecs import Crc32cCodec
    from zarr.codecs.numcodecs import PCodec

    largest = max((int(part.max(initial=0)) for part in parts), default=0)
    if any(int(part.min(initial=0)) < 0 for part in parts):
        raise TargetsError(f"plane {name!r} holds a negative number; a codec let a value pass that it cannot store")
    dtype = next(dtype for dtype in ALLOWED_DTYPES if largest <= np.iinfo(dtype).max)
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


class Container:
    """Reads what `write_container` wrote.

    Raises:
        DamagedCacheError: the file is not such a container; reading a chunk raises it too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attributes, self.sizes = self._check_layout()
        self._arrays = self._open_arrays()

    @property
    def num_chunks(self) -> int:
        return len(next(iter(self.sizes.values())))

    def read(self, name: str, chunk: int) -> Plane:
        """One plane of one chunk, int64 [size]."""
        try:
            row = self._arrays[name][chunk]
        except DamagedCacheError:
            raise
        except Exception as error:  # zarr, numcodecs and zipfile each raise their own kinds on damaged bytes
            raise DamagedCacheError(
                f"{self.path}: array {name!r}, chunk {chunk} cannot be decoded ({type(error).__name__})",
                shard=self.path.name,
                array=name,
                chunk=chunk,
            ) from error
        size = self.sizes[name][chunk]
        if int(row.max(initial=0)) > np.iinfo(np.int64).max:
            raise self._damaged(f"array {name!r} holds a number over 2^63 - 1")
        if np.any(row[size:]):
            raise DamagedCacheError(
                f"{self.path}: array {name!r}, chunk {chunk} holds data beyond its end",
                shard=self.path.name,
                array=name,
                chunk=chunk,
            )
        return np.asarray(row[:size], dtype=np.int64)

    def read_chunk(self, chunk: int) -> dict[str, Plane]:
        """All planes of one chunk."""
        return {name: self.read(name, chunk) for name in self.sizes}

    def close(self) -> None:
        """Release the file."""
        self._store.close()

    def _open_arrays(self) -> dict[str, Any]:
        import zarr
        from zarr.storage import ZipStore

        _expect_numcodecs()
        try:
            self._store = ZipStore(self.path, mode="r")
            group = zarr.open_group(self._store, mode="r")
            return {name: group[name] for name in self.sizes}
        except Exception as error:
            raise self._damaged(f"zarr cannot open it ({type(error).__name__})") from error

    def _check_layout(self) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """Check every metadata file and the member list before zarr sees them."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = archive.namelist()
                attributes = self._metadata(archive, "zarr.json")["attributes"]
                sizes = {str(name): [int(size) for size in row] for name, row in attributes.pop("sizes").items()}
                for name, row in sizes.items():
                    self._check_array(self._metadata(archive, f"{name}/zarr.json"), row)
        except DamagedCacheError:
            raise
        except FileNotFoundError as error:
            raise DamagedCacheError(f"{self.path} is missing; restore it", shard=self.path.name) from error
        except Exception as error:  # zipfile meets damage with seven kinds of exception
            raise self._damaged(type(error).__name__) from error
        chunks = [f"{name}/c/{index}/0" for name, row in sizes.items() for index in range(len(row))]
        if sorted(names) != sorted([*chunks, *(f"{name}/zarr.json" for name in sizes), "zarr.json"]):
            raise self._damaged("its members are not those its metadata names")
        if not sizes or len({len(row) for row in sizes.values()}) != 1:
            raise self._damaged("its arrays have unequal numbers of chunks")
        return attributes, sizes

    def _metadata(self, archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > MAX_METADATA_BYTES:
            raise self._damaged(f"member {name} is compressed or too large")
        return dict(json.loads(archive.read(info)))

    def _check_array(self, metadata: dict[str, Any], sizes: list[int]) -> None:
        shape = [len(sizes), max(1, *sizes)]
        grid = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        if metadata["shape"] != shape or grid != [1, shape[1]] or min(sizes, default=0) < 0:
            raise self._damaged("an array's shape differs from its chunk sizes")
        if metadata["codecs"] != ALLOWED_CODECS or metadata["data_type"] not in ALLOWED_DTYPES:
            raise self._damaged("an array uses a codec or type that this format does not allow")

    def _damaged(self, why: str) -> DamagedCacheError:
        return DamagedCacheError(
            f"{self.path} is damaged or not a shard of this format: {why}; restore it or dump again",
            shard=self.path.name,
        )
