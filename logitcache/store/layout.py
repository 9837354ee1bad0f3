"""Where things lie inside a cache folder, and the errors of finding something else there."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from logitcache.errors import CacheError, UsageError
from logitcache.store.location import refuse_url

ContainerKind = Literal["zarr", "arrow"]
SUFFIXES: dict[ContainerKind, str] = {"zarr": ".zarr.zip", "arrow": ".arrow"}
OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}


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
        """Scratch of a running dump (token file, leases); removed when the cache is complete."""
        return self.root / "work"

    @property
    def leases(self) -> Path:
        """What the workers of a running dump claim; see `logitcache.engines.leases`."""
        return self.work / "leases"

    def shard(self, unit: int, sha256: str) -> Path:
        """A unit's file. The name carries the content, so that a slower worker can never replace what is committed."""
        return self.shards / f"{unit_name(unit)}-{sha256[:12]}{SUFFIXES[self.container]}"

    def commit(self, unit: int) -> Path:
        return self.commits / f"{unit_name(unit)}.json"


def unit_name(unit: int) -> str:
    """Six digits or more."""
    return f"{unit:06d}"


def refuse_inside_cache(root: Path, or_one: bool = False) -> None:
    """Raise UsageError when a new folder would lie inside a cache, whose files are only its own, or `or_one` be one.

    Raises UsageError, too, when it is a URL.
    """
    refuse_url(root)
    if or_one and _is_cache(root):
        raise UsageError(f"{root} is a cache; choose another folder for --out")
    for parent in root.resolve().parents:
        if _is_cache(parent):
            raise UsageError(f"{root} lies inside the cache {parent}; choose another folder for --out")


def refuse_file(root: Path, option: str = " for --out") -> None:
    """Raise UsageError when a new folder would have the name of a file, or lie below one."""
    there = nearest_folder(root)
    if not there.is_dir():
        raise UsageError(f"{there} is a file; choose another folder{option}")


def _is_cache(folder: Path) -> bool:
    return (folder / "plan.json").is_file() and (folder / "commits").is_dir()


def nearest_folder(root: Path) -> Path:
    """`root`, or the nearest path above it that exists: a folder, where `root` can be one."""
    return next((folder for folder in (root, *root.absolute().parents) if folder.exists()), Path("/"))


def refuse_sources(root: Path, sources: Iterable[Path]) -> None:
    """Raise UsageError when a new folder would be one of the caches that are read, or lie inside one."""
    for source in sources:
        if root.resolve() == source.resolve():
            raise UsageError(f"{root} is the cache to read from; choose another folder for --out")
        if source.resolve() in root.resolve().parents:
            raise UsageError(f"{root} lies inside the cache {source}; choose another folder for --out")


@contextmanager
def writing(root: Path, needed_bytes: int = 0, again: str = "it resumes") -> Iterator[None]:
    """Turn an OSError while writing into a CacheError that says how much space there is and how to go on.

    Args:
        root: what is being written.
        needed_bytes: about how many bytes it takes; 0 when that is not known.
        again: what running the same command again does.
    """
    try:
        yield
    except OSError as error:
        # Copying names the file it reads, which is not the one that cannot be written.
        named = Path(error.filename) if isinstance(error.filename, str) else root
        where = named if named.is_relative_to(root) else root
        if error.errno == errno.EFBIG:
            raise CacheError(
                f"{where} cannot be written: a file may not grow so large here (ulimit -f, or a limit of the file "
                f"system); raise it and run the same command again, {again}"
            ) from error
        if error.errno not in OUT_OF_SPACE:
            raise CacheError(
                f"{where} cannot be written ({error.strerror or error}); mend it and run the same command again, "
                f"{again}"
            ) from error
        there = nearest_folder(root)
        needed = f"about {needed_bytes:,} bytes are needed, " if needed_bytes else ""
        raise CacheError(
            f"no space to write {where}: {needed}{shutil.disk_usage(there).free:,} are free (or a quota is reached); "
            f"make room and run the same command again, {again}"
        ) from error


@contextmanager
def outrun(done: Callable[[], bool]) -> Iterator[None]:
    """No error where a temporary file is gone and what it was for is done; to be used around `writing`.

    Another worker was first then, and whoever finished the cache took the file for a leftover.
    """
    try:
        yield
    except CacheError as error:
        if not (isinstance(error.__cause__, FileNotFoundError) and done()):
            raise
