"""The scratch files a dump works from: token ids (int32, little-endian), their mask, and what they were made from."""

from __future__ import annotations

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
    sha256_of_file,
    write_temporary_bytes,
)
from logitcache.store.layout import writing


class TokenFile:
    """`tokens.bin`, `tokens.json` and, of a masked corpus, `mask.bin` in a scratch folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "tokens.bin"
        self.mask_path = folder / "mask.bin"
        self._record_path = folder / "tokens.json"
        self._mapped: NDArray[np.int32] | None = None
        self._mask: NDArray[np.bool_] | None = None

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
        data = checked_json({"key": digest(key), "facts": facts, "file_sha256": self._hash("mask_sha256" in facts)})
        with writing(self.folder):
            replace(write_temporary_bytes(self.folder, "tokens.json", data), self._record_path)

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The facts of a whole file made from `key`, or None."""
        if not (self._record_path.exists() and self.path.exists()):
            return None
        try:
            stored = read_checked_json(self._record_path)
        except CacheError:
            return None
        masked = "mask_sha256" in stored["facts"]
        if stored["key"] != digest(key) or (masked and not self.mask_path.exists()):
            return None
        return dict(stored["facts"]) if stored["file_sha256"] == self._hash(masked) else None

    def _hash(self, masked: bool) -> str:
        """Of the tokens' file, and in a masked corpus of that of the mask, too."""
        tokens = sha256_of_file(self.path)
        return digest([tokens, sha256_of_file(self.mask_path)]) if masked else tokens

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) as int64."""
        if self._mapped is None:
            self._mapped = np.memmap(self.path, dtype="<i4", mode="r")
        return np.asarray(self._mapped[start:stop], dtype=np.int64)

    def read_mask(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Whether tokens [start, stop) are to be learnt."""
        if self._mask is None:
            self._mask = np.memmap(self.mask_path, dtype=np.bool_, mode="r")
        return np.asarray(self._mask[start:stop])
