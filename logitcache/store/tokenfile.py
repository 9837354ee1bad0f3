"""The scratch file of token ids a dump works from: int32, little-endian, with a record of what it was made from."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
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

_HASHED_VALUES = 1 << 20


class TokenFile:
    """`tokens.bin`, `tokens.json` and, of a masked corpus, `mask.bin` in a scratch folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "tokens.bin"
        self.mask_path = folder / "mask.bin"
        self._record_path = folder / "tokens.json"
        self._mapped: _Mapped | None = None

    def prepare(self) -> None:
        """Make the folder, and remove a record that the coming file would contradict."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._record_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove file and record, and the folders around them where nothing else is in them."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
            self.mask_path.unlink(missing_ok=True)
            self._record_path.unlink(missing_ok=True)
            self.folder.rmdir()
            self.folder.parent.rmdir()

    def record(self, key: dict[str, Any], facts: dict[str, Any]) -> None:
        """Note that the file is whole, what it was made from and what is known of it."""
        mapped = self._map("mask_sha256" in facts)
        data = checked_json({"key": digest(key), "facts": facts, "file_sha256": mapped.sha256()})
        with writing(self.folder):
            replace(write_temporary_bytes(self.folder, "tokens.json", data), self._record_path)
        self._mapped = mapped

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
            mapped = self._map("mask_sha256" in stored["facts"])
        except (CacheError, OSError, ValueError):
            return None
        if stored["file_sha256"] != mapped.sha256():
            return None
        self._mapped = mapped
        return dict(stored["facts"])

    @property
    def found(self) -> bool:
        """Whether `find` or `record` saw a whole file, which `read` then reads."""
        return self._mapped is not None

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) as int64, of a file that was found or recorded."""
        assert self._mapped is not None
        return np.asarray(self._mapped.tokens[start:stop], dtype=np.int64)

    def read_mask(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Whether tokens [start, stop) are to be learnt, of a masked corpus."""
        assert self._mapped is not None
        assert self._mapped.mask is not None
        return np.asarray(self._mapped.mask[start:stop])

    def _map(self, masked: bool) -> _Mapped:
        tokens = np.memmap(self.path, dtype="<i4", mode="r")
        return _Mapped(tokens, np.memmap(self.mask_path, dtype=np.bool_, mode="r") if masked else None)


@dataclass(frozen=True, eq=False)
class _Mapped:
    """The files' content: int32 tokens and, of a masked corpus, bool for each."""

    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_] | None

    def sha256(self) -> str:
        """Of the tokens, and in a masked corpus of tokens and mask."""
        tokens = _sha256(self.tokens)
        return tokens if self.mask is None else digest([tokens, _sha256(self.mask)])


def _sha256(values: NDArray[Any]) -> str:
    hashed = hashlib.sha256()
    for start in range(0, values.size, _HASHED_VALUES):
        hashed.update(values[start : start + _HASHED_VALUES].tobytes())
    return hashed.hexdigest()
