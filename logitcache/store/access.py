"""How an open cache reaches its files: in its own folder, or (`remote.py`) as this machine's copies of them."""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from logitcache.errors import DamagedCacheError
from logitcache.store.container import Container, open_container
from logitcache.store.files import sha256_of_file, unreadable
from logitcache.store.layout import Layout
from logitcache.store.schema import Shard

# Of a cache in a folder; a system's limit of open files may be as low as 256.
OPEN_SHARDS = 64


class CacheFiles(ABC):
    """The files of one cache.

    Attributes:
        location: the cache's path or URL, for messages.
        codebook_name: path or URL of the tables, for messages.
        root: folder where files are when they are open.
        open_shards: how many shards a reader may hold open.
    """

    location: str
    codebook_name: str
    root: Path
    open_shards: int

    @abstractmethod
    def shard_name(self, shard: Shard) -> str:
        """A shard's path or URL, for messages."""

    @abstractmethod
    def check_shard(self, shard: Shard) -> None:
        """Raise DamagedCacheError unless the shard's file has the committed size and SHA-256."""

    @abstractmethod
    def open_shard(self, shard: Shard, check: bool) -> Container:
        """Open a shard; `check` compares its file with the manifest first.

        Raises:
            DamagedCacheError: the file is missing or not what was committed.
            CacheError, RemoteError: it cannot be read.
        """

    @abstractmethod
    @contextmanager
    def codebook(self, sha256: str) -> Iterator[Path]:
        """The file of the tables. Raises DamagedCacheError when it is missing or has another SHA-256."""

    @abstractmethod
    def codebook_bytes(self) -> int:
        """Size of the file of the tables."""

    @abstractmethod
    def num_bytes(self, shards: Sequence[Shard]) -> int:
        """Bytes of these shards and of all other files that are there."""

    @abstractmethod
    def missing_shards(self, shards: Sequence[Shard]) -> list[str]:
        """Names of those whose files are known not to be there; nothing is read."""

    @abstractmethod
    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Begin to fetch what is read next, where it is not at hand."""


class LocalFiles(CacheFiles):
    """The files of a cache in a folder of this machine."""

    open_shards = OPEN_SHARDS

    def __init__(self, layout: Layout) -> None:
        self.root, self.location, self._layout = layout.root, str(layout.root), layout
        self.codebook_name = str(layout.codebook)

    def shard_name(self, shard: Shard) -> str:
        return str(self._layout.shards / shard.file)

    def check_shard(self, shard: Shard) -> None:
        check_shard_file(self._layout.shards / shard.file, shard)

    def open_shard(self, shard: Shard, check: bool) -> Container:
        if check:
            self.check_shard(shard)
        return open_container(self._layout.shards / shard.file)

    @contextmanager
    def codebook(self, sha256: str) -> Iterator[Path]:
        path = self._layout.codebook
        if not path.exists() or sha256_of_file(path) != sha256:
            raise DamagedCacheError(f"{path} is missing or differs from the manifest; restore the file")
        yield path

    def codebook_bytes(self) -> int:
        return self._layout.codebook.stat().st_size

    def num_bytes(self, shards: Sequence[Shard]) -> int:
        files = [self._layout.manifest, self._layout.plan, self._layout.codebook, *self._layout.commits.glob("*.json")]
        files += [self._layout.shards / shard.file for shard in shards]
        return sum(path.stat().st_size for path in files if path.is_file())

    def missing_shards(self, shards: Sequence[Shard]) -> list[str]:
        return [shard.file for shard in shards if not (self._layout.shards / shard.file).is_file()]

    def prefetch(self, shards: Sequence[Shard]) -> None:
        pass


def check_shard_file(path: Path, shard: Shard) -> None:
    """Raise DamagedCacheError unless the file has the committed size and SHA-256."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DamagedCacheError(f"{path} is not a file; remove it and dump again", shard=shard.file)
        size = status.st_size
        sha256 = sha256_of_file(path) if size == shard.num_bytes else ""
    except FileNotFoundError as error:
        raise DamagedCacheError(f"{path} is missing; restore it or dump again", shard=shard.file) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if size != shard.num_bytes:
        raise DamagedCacheError(
            f"{path} has {size} bytes, not {shard.num_bytes}; restore it, or remove it and dump again", shard=shard.file
        )
    if sha256 != shard.sha256:
        raise DamagedCacheError(
            f"{path} is damaged: its SHA-256 differs; restore it, or remove it and dump again", shard=shard.file
        )
