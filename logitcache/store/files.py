"""Durable file operations, checksummed JSON, and named failpoints for the tests that kill a process half-way."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from logitcache.errors import CacheError, DamagedCacheError

MAX_JSON_BYTES = 64 << 20
READ_ATTEMPTS = 3
FAILPOINT_VARIABLE = "LOGITCACHE_FAILPOINT"


def failpoint(name: str) -> None:
    """Kill, stop or fail (OSError) here when `LOGITCACHE_FAILPOINT` is `name:kill`, `name:stop` or `name:error`."""
    wanted, _, action = os.environ.get(FAILPOINT_VARIABLE, "").rpartition(":")
    if wanted != name:
        return
    if action == "stop":
        # Once: who continues it goes on.
        os.environ[FAILPOINT_VARIABLE] = ""
        # Sent to the process, it might find this thread a few operations further.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return
    if action == "kill":
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(f"failpoint {name}")


def unreadable(path: Path, error: OSError) -> CacheError:
    """The one sentence for a file that the system does not let us read."""
    reason = error.strerror or str(error)
    return CacheError(f"{path} cannot be read: {reason}; check that it is there and may be read, and the disk")


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(fields: Any) -> bytes:
    """One spelling for one value: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest(fields: Any) -> str:
    """Hex SHA-256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(fields)).hexdigest()


def read_at(handle: int, offset: int, count: int) -> bytes:
    """`count` bytes of an open file from `offset` on; fewer only where the file ends.

    A read that fails is tried again, a few times, and one that gives too little is continued. Raises OSError.
    """
    parts: list[bytes] = []
    failures = 0
    while count:
        try:
            part = os.pread(handle, count, offset)
        except OSError:
            failures += 1
            if failures == READ_ATTEMPTS:
                raise
            continue
        if not part:
            break
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def fsync_folder(folder: Path) -> None:
    """Make renames and links inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_durable(folder: Path) -> None:
    """Make a folder, and its own name durable, unless the folder around it may not be read."""
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(PermissionError):
        fsync_folder(folder.parent)


def write_temporary(folder: Path, stem: str, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a new `<stem>.<random>.tmp` in `folder`, fsync it, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=f"{stem}.", suffix=".tmp")
    os.close(handle)
    path = Path(name)
    try:
        path.chmod(0o644)
        write(path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def write_temporary_bytes(folder: Path, stem: str, data: bytes) -> Path:
    """`write_temporary` of bytes that are at hand."""
    return write_temporary(folder, stem, lambda path: path.write_bytes(data))


def publish(temporary: Path, final: Path) -> bool:
    """Give a finished temporary file its name, create-only and durably. False: the name was taken already."""
    try:
        os.link(temporary, final)
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
        fsync_folder(final.parent)


def replace(temporary: Path, final: Path) -> None:
    """Move a finished temporary file over `final` atomically and durably."""
    temporary.replace(final)
    fsync_folder(final.parent)


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with a `checksum` over all of them."""
    return {**fields, "checksum": digest(fields)}


def checked_json(fields: dict[str, Any]) -> bytes:
    """Readable JSON of `fields` with a `checksum` over all other fields."""
    return (json.dumps(sealed(fields), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def strict_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object that every reader understands the same: no duplicate keys, no NaN.

    Raises:
        ValueError, RecursionError, TypeError: it is something else.
    """
    fields = json.loads(data, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    if not isinstance(fields, dict):
        raise TypeError("not an object")
    return fields


def read_checked_json(path: Path) -> dict[str, Any]:
    """Read what `checked_json` wrote.

    Raises:
        CacheError: the file cannot be read.
        DamagedCacheError: it is not JSON of the expected form, or its checksum differs.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DamagedCacheError(
                f"{path} is over {MAX_JSON_BYTES >> 20} MB, which no {path.name} is; restore the right file"
            )
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    return parse_checked_json(data, path)


def parse_checked_json(data: bytes, where: str | Path) -> dict[str, Any]:
    """What `checked_json` wrote, found at `where`. Raises DamagedCacheError."""
    try:
        fields = strict_json(data)
        stored = fields.pop("checksum")
        intact = stored == digest(fields)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DamagedCacheError(f"{where} is damaged: it is not a checksummed JSON object; restore the file") from error
    if not intact:
        raise DamagedCacheError(f"{where} is damaged: its content differs from its checksum; restore the file")
    return fields


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("duplicate key")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
