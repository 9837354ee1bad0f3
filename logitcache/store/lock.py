"""Keeps `gc` from files that somebody is writing: writers share a lock on plan.json, `gc` wants it alone.

The operating system frees the lock when a process ends, however it ends; no clock and no lease is involved.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from logitcache.errors import CacheError


def hold_shared(plan: Path) -> BinaryIO:
    """Lock a cache as one of its writers, until the returned file is closed."""
    file = plan.open("rb")
    # A file system without locks must not keep anybody from writing.
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


@contextmanager
def held_alone(document: Path) -> Iterator[None]:
    """Lock a cache that nobody writes to. Raises CacheError where somebody does, or nobody can tell."""
    with document.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CacheError(f"{document.parent} is being written; wait until that run ends, then try again") from error
        except OSError as error:
            raise CacheError(
                f"{document} cannot be locked ({error.strerror}), so nobody can tell whether a run is writing there; "
                "work on a copy on a local disk"
            ) from error
        yield
