"""Where things lie inside a cache folder, and the errors of finding something else there."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.request import url2pathname

from logitcache.errors import CacheError

ContainerKind = Literal["zarr", "arrow"]
SUFFIXES: dict[ContainerKind, str] = {"zarr": ".zarr.zip", "arrow": ".arrow"}
OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Layout:
    """Paths of one cache.

    Args:
        root: the cache's folder.
        container: kind of its shards and tables; `identity.container` of its plan.
    """

    root: Path
    container: ContainerKind = "zarr"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def codebook(self) -> Path:
        return self.root / "codebook" / f"tables{SUFFIXES[self.container]}"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def commits(self) -> Path:
        return self.root / "commits"

    @property
    def work(self) -> Path:
        """Scratch of a running dump (token file); removed when the cache is complete."""
        return self.root / "work"

    def shard(self, unit: int, sha256: str) -> Path:
        """A unit's file. The name carries the content, so that a slower worker can never replace what is committed."""
        return self.shards / f"{unit_name(unit)}-{sha256[:12]}{SUFFIXES[self.container]}"

    def commit(self, unit: int) -> Path:
        return self.commits / f"{unit_name(unit)}.json"


def unit_name(unit: int) -> str:
    """Six digits or more."""
    return f"{unit:06d}"


def local_root(location: str | Path) -> Path:
    """The folder of a path or file:// URL. Raises CacheError for other schemes."""
    text = str(location)
    if text.startswith("file://"):
        return Path(url2pathname(text.removeprefix("file://")))
    scheme, separator, _ = text.partition("://")
    if separator:
        raise CacheError(f"{text} cannot be opened: {scheme}:// is not supported; copy the cache to a local folder")
    return Path(text)


@contextmanager
def writing(root: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError while writing into a CacheError that says how much space there is and how to go on."""
    try:
        yield
    except OSError as error:
        where = error.filename or root
        if error.errno not in OUT_OF_SPACE:
            raise CacheError(
                f"{where} cannot be written ({error.strerror or error}); mend it and run the same command again, "
                "it resumes"
            ) from error
        free = shutil.disk_usage(root).free if root.exists() else 0
        raise CacheError(
            f"no space to write {where}: about {needed_bytes:,} bytes are needed, {free:,} are free (or a quota is "
            "reached); make room and run the same command again, it resumes"
        ) from error
