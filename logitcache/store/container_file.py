"""What both containers share: the reader's interface, limits on what a file may claim, and how damage is reported.

A container is one immutable file of chunked planes. A plane is a named sequence of non-negative integers for every
chunk; all planes have the same number of chunks, and a chunk's planes may have different lengths.
"""

from __future__ import annotations

import os
import re
import stat
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import FRESH, Memory
from logitcache.errors import CacheError, DamagedCacheError, TargetsError
from logitcache.store.files import READ_ATTEMPTS, read_at, unreadable

ALLOWED_DTYPES = ("uint16", "uint32", "uint64")
# Limits that hold before anything is allocated, whatever a file claims.
MAX_PLANE_INTEGERS = 1 << 26
MAX_PLANES = 64
MAX_INTEGER = (1 << 63) - 1
MAX_METADATA_BYTES = 1 << 20
MAX_DIRECTORY_BYTES = 8 << 20
PLANE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

Plane = NDArray[np.integer[Any]]
Sizes = dict[str, list[int]]


class _ReadError(Exception):
    """The operating system could not read; says nothing of what is stored."""


class Container(ABC):
    """A container opened for reading; `open_container` makes one.

    Metadata is checked when it is opened, a plane when it is read. Reads take their place in the file along, so
    that threads and forked children may share one.

    Args:
        path: the file.

    Attributes:
        attributes: what the writer was given.
        sizes: for each plane, the number of integers of every chunk.

    Raises:
        DamagedCacheError: the file is not such a container; reading a plane raises it too.
        CacheError: the file cannot be read.
    """

    attributes: dict[str, Any]
    sizes: Sizes

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode):
                # Opening a pipe would wait for ever.
                raise self._damaged("it is a folder" if stat.S_ISDIR(mode) else "it is not a file")
            self._file = path.open("rb")
        except FileNotFoundError as error:
            raise DamagedCacheError(f"{path} is missing; restore it", shard=path.name) from error
        except OSError as error:
            raise unreadable(path, error) from error
        weakref.finalize(self, self._file.close)
        try:
            self.num_bytes = os.fstat(self._file.fileno()).st_size
            self.attributes, self.sizes = self._open()
            self._check_sizes()
        except CacheError:
            self.close()
            raise
        except _ReadError as error:
            self.close()
            raise CacheError(
                f"{path} cannot be read: {error}; check the disk or the file system and try again"
            ) from error
        except Exception as error:  # each library meets damage with several kinds of exception
            self.close()
            raise self._damaged(type(error).__name__) from error

    @property
    def num_chunks(self) -> int:
        return len(next(iter(self.sizes.values())))

    def read(self, name: str, chunk: int, memory: Memory = FRESH) -> Plane:
        """One plane of one chunk, uint16, uint32 or uint64 [size] as stored; every number is below 2^63."""
        try:
            plane = self._read(name, chunk, self.sizes[name][chunk], memory)
        except DamagedCacheError:
            raise
        except _ReadError as error:
            raise CacheError(
                f"{self.path}: array {name!r}, chunk {chunk} cannot be read ({error}, {READ_ATTEMPTS} times); check "
                "the disk or the file system and try again"
            ) from error
        except MemoryError as error:
            what = f"{self.path}: array {name!r}, chunk {chunk} does not fit into memory"
            raise CacheError(f"{what}; end other programs, or read it on a machine with more") from error
        except Exception as error:
            raise self._damaged_plane(name, chunk, f"cannot be decoded ({type(error).__name__})") from error
        if plane.dtype.itemsize == 8 and int(plane.max(initial=0)) > MAX_INTEGER:
            raise self._damaged_plane(name, chunk, "holds a number over 2^63 - 1")
        return plane

    def read_chunk(self, chunk: int, memory: Memory = FRESH) -> dict[str, Plane]:
        """All planes of one chunk."""
        return {name: self.read(name, chunk, memory) for name in self.sizes}

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    @abstractmethod
    def stored_bytes(self, name: str) -> int:
        """Bytes that the compressed chunks of a plane take."""

    @abstractmethod
    def _open(self) -> tuple[dict[str, Any], Sizes]:
        """Check the file's structure; return attributes and sizes as they stand there."""

    @abstractmethod
    def _read(self, name: str, chunk: int, size: int, memory: Memory) -> Plane:
        """Decode `size` integers. May raise anything."""

    def _bytes(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`; refused, before they are allocated, where the file has no such bytes."""
        if not (offset >= 0 and 0 <= count <= self.num_bytes - offset):
            raise self._damaged("it points outside itself")
        try:
            data = read_at(self._file.fileno(), offset, count)
        except OSError as error:
            raise _ReadError(error.strerror or str(error)) from error
        if len(data) != count:
            raise self._damaged("it ends early")
        return data

    def _check_sizes(self) -> None:
        if type(self.attributes) is not dict:
            raise self._damaged("its attributes are no object")
        rows = list(self.sizes.values())
        if not 1 <= len(rows) <= MAX_PLANES or len({len(row) for row in rows}) != 1 or not rows[0]:
            raise self._damaged("its arrays have unequal numbers of chunks")
        if not all(type(size) is int and 0 <= size <= MAX_PLANE_INTEGERS for row in rows for size in row):
            raise self._damaged(f"an array claims a size that is not in 0 to {MAX_PLANE_INTEGERS:,}")

    def _damaged(self, why: str) -> DamagedCacheError:
        return DamagedCacheError(
            f"{self.path} is damaged or not a shard of this format: {why}; restore it or dump again",
            shard=self.path.name,
        )

    def _damaged_plane(self, name: str, chunk: int, why: str) -> DamagedCacheError:
        return DamagedCacheError(
            f"{self.path}: array {name!r}, chunk {chunk} {why}; restore the file, or remove it and dump again",
            shard=self.path.name,
            array=name,
            chunk=chunk,
        )


def dtypes_of(chunks: Sequence[Mapping[str, Plane]]) -> dict[str, np.dtype[Any]]:
    """The narrowest allowed type of every plane.

    Raises:
        TargetsError: a plane holds a negative number or one over 2^63 - 1, or there is more than the format allows.
    """
    if len(chunks[0]) > MAX_PLANES:
        raise TargetsError(f"a chunk has {len(chunks[0])} planes, over the format's {MAX_PLANES}")
    return {name: _dtype_of(name, [chunk[name] for chunk in chunks]) for name in chunks[0]}


def _dtype_of(name: str, parts: Sequence[Plane]) -> np.dtype[Any]:
    if not PLANE_NAME.fullmatch(name):
        raise TargetsError(f"plane {name!r} needs a name of letters, digits, '-' and '_'")
    if any(int(part.min(initial=0)) < 0 for part in parts):
        raise TargetsError(f"plane {name!r} holds a negative number; a codec let a value pass that it cannot store")
    longest = max(part.size for part in parts)
    if longest > MAX_PLANE_INTEGERS:
        raise TargetsError(
            f"plane {name!r} of a chunk has {longest:,} numbers, over the format's {MAX_PLANE_INTEGERS:,}; "
            "use a shorter --block-length"
        )
    largest = max(int(part.max(initial=0)) for part in parts)
    if largest > MAX_INTEGER:
        raise TargetsError(f"plane {name!r} holds {largest}, which is over 2^63 - 1")
    return np.dtype(next(dtype for dtype in ALLOWED_DTYPES if largest <= np.iinfo(dtype).max))


def check_metadata_bytes(count: int, limit: int = MAX_METADATA_BYTES) -> None:
    """Raise TargetsError where a reader would refuse the metadata a writer is about to write."""
    if count > limit:
        raise TargetsError(
            f"a shard's metadata takes {count:,} bytes, over the format's {limit:,}; use fewer --unit-tokens"
        )
