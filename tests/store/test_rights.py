"""Rights of the folder to write in, asked before the costly work begins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from logitcache.errors import CacheError
from logitcache.store import check_place

_NOBODY = 65534


@contextmanager
def _closed(folder: Path) -> Iterator[None]:
    """Nobody may write the folder; `os.access` asks for the real user, whom the superuser can set aside."""
    folder.chmod(0o555)
    superuser = os.getuid() == 0
    if superuser:
        os.setreuid(_NOBODY, 0)
    try:
        yield
    finally:
        if superuser:
            os.setreuid(0, 0)
        folder.chmod(0o755)


def test_a_folder_that_may_not_be_written_is_said_at_once(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    check_place(closed / "a" / "cache")
    with (
        _closed(closed),
        pytest.raises(CacheError, match=r"this user may not write .*closed, or it"),
    ):
        check_place(closed / "a" / "cache")


def test_a_finished_cache_may_be_read_only(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for name in ("plan.json", "manifest.json"):
        (tmp_path / "cache" / name).touch()
    with _closed(tmp_path / "cache"):
        check_place(tmp_path / "cache")
