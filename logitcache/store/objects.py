"""Named objects in one place, a folder or a bucket: what copying and remote reading need of either."""

from __future__ import annotations

import hashlib
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from logitcache.errors import CacheError, DamagedCacheError
from logitcache.store.files import (
    fsync_folder,
    publish,
    replace,
    sha256_of_file,
    unreadable,
    write_temporary,
    write_temporary_bytes,
)
from logitcache.store.layout import writing
from logitcache.store.location import S3Location, parse_location

if TYPE_CHECKING:
    from logitcache.store.objects_s3 import S3Objects

PIECE_BYTES = 1 << 20
# How often a whole object is fetched again when what arrived is not what was committed.
FETCHES = 3


class ObjectChanged(Exception):
    """An object was replaced while it was being read."""


class MissingObject(DamagedCacheError):
    """There is no object of this name."""


class Source(Protocol):
    """What is read when a file is copied."""

    def url(self, name: str) -> str:
        """See `Objects`."""

    def stream(self, name: str) -> Iterator[bytes]:
        """See `Objects`."""


class Objects(ABC):
    """Objects below one place; names are relative to it, with `/` between their parts.

    Attributes:
        location: path or URL of the place.
    """

    location: str

    def url(self, name: str) -> str:
        """Path or URL of an object, for messages."""
        return f"{self.location}/{name}"

    def read(self, name: str, limit: int) -> bytes | None:
        """A small object; None where there is none. Raises DamagedCacheError when it is longer than `limit` bytes."""
        for failures in range(1, FETCHES + 1):
            data = bytearray()
            try:
                for piece in self.stream(name):
                    data += piece
                    if len(data) > limit:
                        raise DamagedCacheError(f"{self.url(name)} is over {limit:,} bytes; restore the right file")
                return bytes(data)
            except MissingObject:
                return None
            except ObjectChanged:
                pause(failures)
        raise CacheError(f"{self.url(name)} changes all the time; wait until nobody writes it, then try again")

    @abstractmethod
    def stream(self, name: str) -> Iterator[bytes]:
        """The bytes of an object, piece by piece.

        Raises:
            MissingObject: there is none.
            ObjectChanged: it was replaced on the way; what came so far is of the old one.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of an object, None where there is none."""

    @abstractmethod
    def has(self, name: str, num_bytes: int, sha256: str) -> bool:
        """Whether an object is there and known to have this size and content."""

    @abstractmethod
    def put_file(self, name: str, source: Source, num_bytes: int, sha256: str) -> None:
        """Copy the object `name` of `source`, which must have this size and content."""

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Write a small object, over one that is there."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a small object where there is none. False: there is one."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove an object, if it is there and may be removed."""

    @abstractmethod
    def sizes(self, under: str = "") -> Iterator[tuple[str, int]]:
        """Name and bytes of every object there is whose name begins with `under`: nothing, or ending in a slash."""


class LocalObjects(Objects):
    """The files of a folder; what is written is durable."""

    def __init__(self, root: Path) -> None:
        self.root, self.location = root, str(root)

    def stream(self, name: str) -> Iterator[bytes]:
        path = self.root / name
        try:
            with path.open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    yield piece
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingObject(f"{path} is missing; restore it", shard=path.name) from error
        except OSError as error:
            raise unreadable(path, error) from error

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def has(self, name: str, num_bytes: int, sha256: str) -> bool:
        path = self.root / name
        return path.is_file() and path.stat().st_size == num_bytes and sha256_of_file(path) == sha256

    def put_file(self, name: str, source: Source, num_bytes: int, sha256: str) -> None:
        def fill(temporary: Path) -> None:
            with temporary.open("wb") as file:
                fetch(source, name, file, num_bytes, sha256)

        path = self.root / name
        with writing(self.root, needed_bytes=num_bytes):
            replace(write_temporary(path.parent, path.name, fill), path)

    def put(self, name: str, data: bytes) -> None:
        path = self.root / name
        with writing(self.root):
            replace(write_temporary_bytes(path.parent, path.name, data), path)

    def create(self, name: str, data: bytes) -> bool:
        path = self.root / name
        with writing(self.root):
            return publish(write_temporary_bytes(path.parent, path.name, data), path)

    def remove(self, name: str) -> None:
        path = self.root / name
        with writing(self.root):
            path.unlink(missing_ok=True)
            fsync_folder(path.parent)

    def sizes(self, under: str = "") -> Iterator[tuple[str, int]]:
        for folder, _, names in os.walk(self.root / under):
            for name in names:
                path = Path(folder) / name
                try:
                    num_bytes = path.lstat().st_size
                except FileNotFoundError:  # temporary files of others come and go
                    continue
                yield path.relative_to(self.root).as_posix(), num_bytes


def open_objects(location: str | Path) -> Objects:
    """The objects of a folder, or of a prefix in a bucket. Raises CacheError."""
    place = parse_location(location)
    return open_bucket(str(place)) if isinstance(place, S3Location) else LocalObjects(place)


def open_bucket(url: str) -> S3Objects:
    """The objects of `s3://bucket/prefix`. Raises CacheError."""
    from logitcache.store.objects_s3 import S3Objects

    place = parse_location(url)
    assert isinstance(place, S3Location)
    return S3Objects(place)


def fetch(source: Source, name: str, file: BinaryIO, num_bytes: int, sha256: str) -> None:
    """Write an object to `file`, from its beginning, and return when exactly what was committed has arrived.

    Raises:
        DamagedCacheError: it is missing, or has other bytes however often it is fetched.
    """
    for failures in range(FETCHES):
        if failures:
            pause(failures)
        try:
            wrong = _fetch_once(source, name, file, num_bytes, sha256)
        except ObjectChanged:
            wrong = "changed while it was fetched"
        if not wrong:
            return
    raise DamagedCacheError(
        f"{source.url(name)} {wrong}: it was damaged or replaced there; restore it, or push the cache again",
        shard=name.rpartition("/")[2],
    )


def _fetch_once(source: Source, name: str, file: BinaryIO, num_bytes: int, sha256: str) -> str:
    """What is wrong with what arrived, or nothing."""
    file.seek(0)
    arrived, count = hashlib.sha256(), 0
    for piece in source.stream(name):
        count += len(piece)
        if count > num_bytes:
            return f"has more than the {num_bytes} bytes that the manifest gives it"
        file.write(piece)
        arrived.update(piece)
    file.flush()
    if count != num_bytes:
        return f"has {count} bytes, not {num_bytes}"
    return "" if arrived.hexdigest() == sha256 else "differs from its SHA-256 in the manifest"


def pause(failures: int) -> None:
    """Wait before the next try: about 0.1 s after the first failure, twice as long after each other one, at most 5 s.

    Random, so that many processes do not come back at the same moment.
    """
    time.sleep(min(0.1 * 2 ** (failures - 1), 5) * random.uniform(0.5, 1))
