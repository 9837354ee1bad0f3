"""The scratch file of token ids a dump works from: int32, little-endian, with a record of what it was made from."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import CacheError
from logitcache.store.files import (
    checked_json,
    digest,
    read_checked_json,
    replace,
    write_temporary_bytes,
)
from logitcache.store.layout import writing

_HASHED_TOKENS = 1 << 20


class TokenFile:
    """`tokens.bin` and `tokens.json` in a scratch folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "tokens.bin"
        self._record_path = folder / "tokens.json"
        self._mapped: NDArray[np.int32] | None = None

    def prepare(self) -> None:
        """Make the folder, and remove a record that the coming file would contradict."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._record_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove file and record, and the folders around them where nothing else is in them."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
            self._record_path.unlink(missing_ok=True)
            self.folder.rmdir()
            self.folder.parent.rmdir()

    def record(self, key: dict[str, Any], facts: dict[str, Any]) -> None:
        """Note that the file is whole, what it was made from and what is known of it."""
        tokens = self._map()
        data = checked_json({"key": digest(key), "facts": facts, "file_sha256": _sha256(tokens)})
        with writing(self.folder):
            replace(write_temporary_bytes(self.folder, "tokens.json", data), self._record_path)
        self._mapped = tokens

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The facts of a whole file made from `key`, or None.

        What is found stays mapped: another run that replaces or removes the file takes nothing from this one.
        """
        if not (self._record_path.exists() and self.path.exists()):
            return None
        try:
            stored = read_checked_json(self._record_path)
            if stored["key"] != digest(key):
                return None
            tokens = self._map()
        except (CacheError, OSError, ValueError):
            return None
        if stored["file_sha256"] != _sha256(tokens):
            return None
        self._mapped = tokens
        return dict(stored["facts"])

    @property
    def found(self) -> bool:
        """Whether `find` or `record` saw a whole file, which `read` then reads."""
        return self._mapped is not None

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) as int64."""
        if self._mapped is None:
            self._mapped = self._map()
        return np.asarray(self._mapped[start:stop], dtype=np.int64)

    def _map(self) -> NDArray[np.int32]:
        return np.memmap(self.path, dtype="<i4", mode="r")


def _sha256(tokens: NDArray[np.int32]) -> str:
    hashed = hashlib.sha256()
    for start in range(0, tokens.size, _HASHED_TOKENS):
        hashed.update(tokens[start : start + _HASHED_TOKENS].tobytes())
    return hashed.hexdigest()
