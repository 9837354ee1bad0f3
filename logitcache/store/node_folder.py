"""A bounded folder of fetched files that all processes of a machine share: each file is fetched once.

Who reads a file holds a shared `flock` on it (a lease), and who removes a file must hold it alone. Who fetches a file
holds `<name>.part` alone, writes it, and renames it when it is whole; others wait for that lock and use the result. The
operating system frees locks when a process ends, however it ends, so the dead block nobody, and a half file keeps the
name `.part`, from which nobody reads.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

from logitcache.errors import CacheError
from logitcache.store.layout import writing

PART = ".part"
# A download that writes nothing for so long is not waited for any more: its process may be stopped.
STALLED_SECONDS = 60.0
# So often may the whole folder go while one file is fetched.
LOST_FOLDERS = 20
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}

# Fills an empty file with exactly what it should hold, or raises.
Fetch = Callable[[BinaryIO], None]


@dataclass(frozen=True)
class Lease:
    """A file that stays in the folder until `close`.

    Args:
        path: of the file.
        fresh: whether it was fetched just now, so that its content is known to be right.
    """

    path: Path
    fresh: bool
    _file: BinaryIO

    def close(self) -> None:
        """Let it go; files that are open stay readable."""
        self._file.close()

    def discard(self) -> None:
        """Remove a file that is not what it should be, and let it go."""
        with suppress(OSError):
            if _is_at(self._file, self.path):
                self.path.unlink()
        self.close()


class NodeFolder:
    """The folder.

    Args:
        root: made when it is needed.
        max_bytes: before a file is fetched, those that were not used for longest are removed, until it fits. Only what
            is in use at one moment, and the file itself, may be more than this.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root, self.max_bytes = root, max_bytes

    def hold(self, name: str, num_bytes: int, fetch: Fetch) -> Lease:
        """A lease on the file `name` (`folder/file`), which is fetched when it is not there.

        Raises:
            PermissionError, OSError with EROFS: it is not there, and nothing can be written.
            CacheError: there is no space, or the folder cannot be used.
            Exception: whatever `fetch` raises.
        """
        path = self.root / name
        for attempt in count():
            try:
                lease = self._lease(path) or self._fetched(path, num_bytes, fetch)
            except FileNotFoundError as error:  # somebody has removed the whole folder just now
                if attempt == LOST_FOLDERS:
                    raise CacheError(f"{path.parent} is removed again and again; set LOGITCACHE_LOCAL_DIR") from error
                continue
            if lease is not None:
                return lease
        raise AssertionError("unreachable")

    def _lease(self, path: Path) -> Lease | None:
        """A lease on a file that is there."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        return self._leased(file, path, fresh=False)

    def _leased(self, file: BinaryIO, path: Path, fresh: bool) -> Lease | None:
        """None when the file was removed before it could be held."""
        _lock(file, fcntl.LOCK_SH)  # held alone for an instant only, by who removes it
        if os.fstat(file.fileno()).st_nlink == 0:
            file.close()
            return None
        with suppress(OSError):  # the time of last use; of another user's file it cannot be set
            os.utime(file.fileno())
        return Lease(path, fresh, file)

    def _fetched(self, path: Path, num_bytes: int, fetch: Fetch) -> Lease | None:
        """Fetch a file, or wait for who does. None: look again."""
        for attempt in count():
            part = path.with_name(f"{path.name}.{attempt}{PART}")
            file = self._open_part(part)
            if not _wait_for(file, part, path):
                file.close()
                if path.exists():
                    return None
                continue
            if not _is_at(file, part):  # it has got its name, its owner gave up, or somebody removed it
                file.close()
                return None
            return self._fetch(file, part, path, num_bytes, fetch)
        raise AssertionError("unreachable")

    def _fetch(self, file: BinaryIO, part: Path, path: Path, num_bytes: int, fetch: Fetch) -> Lease | None:
        """Fetch into a part that is locked."""
        try:
            if path.exists():
                part.unlink(missing_ok=True)
                file.close()
                return None
            with writing(self.root, num_bytes, "or set LOGITCACHE_LOCAL_DIR to another folder"):
                self._reserve(file, num_bytes)
                fetch(file)
                if not _is_at(file, part):  # the folder was removed; what has this name now is another's
                    raise FileNotFoundError(errno.ENOENT, "removed while it was fetched", str(part))
                part.rename(path)
        except BaseException as error:
            lost = not _is_at(file, part)
            with suppress(OSError):
                if not lost:
                    part.unlink()
            with suppress(OSError):  # what could not be written is given up
                file.close()
            if lost and isinstance(error.__cause__, FileNotFoundError):
                raise error.__cause__ from None
            raise
        return self._leased(file, path, fresh=True)

    def _open_part(self, part: Path) -> BinaryIO:
        """Open, not truncate: its owner may be writing it."""
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            return os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
        except OSError as error:
            if error.errno in (*READ_ONLY, errno.ENOENT):
                raise
            if error.errno == errno.EEXIST and not part.parent.is_file():
                # pathlib met a folder that was removed before it could look what it is.
                raise FileNotFoundError(errno.ENOENT, "removed while it was made", str(part.parent)) from error
            raise CacheError(f"{part} cannot be written: {error.strerror}; set LOGITCACHE_LOCAL_DIR") from error

    def _reserve(self, file: BinaryIO, num_bytes: int) -> None:
        """Make room for a file, and give it its size at once so that others count it."""
        with self._alone():
            self._make_room(num_bytes)
            try:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                os.ftruncate(file.fileno(), num_bytes)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.root / "lock").open("ab") as file:
            _lock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, num_bytes: int) -> None:
        """Remove what was not used for longest, and what the dead left, until `num_bytes` fit."""
        files = sorted(self._files(), key=lambda found: found[0])
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            free = shutil.disk_usage(self.root).free
            fits = total + num_bytes <= self.max_bytes and num_bytes <= free
            if (not fits or path.suffix == PART) and _remove_unused(path):
                total -= size

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Time of last use, size and path of every file. A folder with a dot in its name is somebody's scratch."""
        for folder in self.root.iterdir():
            for path in folder.iterdir() if folder.is_dir() and "." not in folder.name else ():
                with suppress(FileNotFoundError):
                    status = path.stat()
                    yield status.st_mtime_ns, status.st_size, path


def _wait_for(file: BinaryIO, part: Path, path: Path) -> bool:
    """Lock a part alone, or find it gone. False: the file is there, or the part's owner seems to be stopped, as it
    writes nothing.
    """
    pause, seen, since = 0.005, -1, time.monotonic()
    while not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        if not _is_at(file, part):  # its owner may hold it as a lease for long
            return True
        written = os.fstat(file.fileno()).st_mtime_ns
        if written != seen:
            seen, since = written, time.monotonic()
        elif time.monotonic() - since > STALLED_SECONDS:
            return False
        if path.exists():
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return True


def _remove_unused(path: Path) -> bool:
    """Remove a file that nobody holds. False: somebody does."""
    try:
        with path.open("rb") as file:
            if not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            if _is_at(file, path):
                path.unlink()
            return True
    except OSError:
        return False


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether a path is, still, that of an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO, how: int) -> bool:
    """`flock`. False: somebody else holds it (LOCK_NB). Raises CacheError where the file system has no locks."""
    try:
        fcntl.flock(file, how)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        raise CacheError(
            f"{file.name} cannot be locked ({error.strerror}); set LOGITCACHE_LOCAL_DIR to a folder on a local disk"
        ) from error
