"""Disks that fail: each call that makes something durable, power cuts at every moment, reads that fail or fall short.

The model of a power cut: of a file only what it held when it was last fsynced is left, of a folder the names it had
when that was; a folder whose own name was not made durable is gone with all that is in it.
"""

from __future__ import annotations

import errno
import os
import shutil
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from logitcache.errors import CacheError, DamagedCacheError
from logitcache.store import open_cache, verify
from logitcache.store.files import READ_ATTEMPTS, read_at
from logitcache.store.layout import ContainerKind
from tests.store.caches import CONTAINERS, files_of, make_cache

# ---------------------------------------------------------------------------------------------- calls that fail


@dataclass
class Failing:
    """Fails the `moment`-th call of one kind with EIO; counts them, and remembers which files were fsynced.

    A kernel that failed an fsync may have dropped the data and report success the next time.
    """

    moment: int
    calls: int = 0
    failed: int | None = None
    synced: list[int] = field(default_factory=list)

    def around(self, call: Callable[..., Any], inode: Callable[..., int] | None = None) -> Callable[..., Any]:
        def checked(*arguments: Any, **more: Any) -> Any:
            self.calls += 1
            number = inode(*arguments) if inode is not None else 0
            if self.calls == self.moment:
                self.failed = number
                raise OSError(errno.EIO, os.strerror(errno.EIO), None)
            self.synced.append(number)
            return call(*arguments, **more)

        return checked


def failing(patch: pytest.MonkeyPatch, operation: str, moment: int) -> Failing:
    shim = Failing(moment)
    if operation == "fsync":
        patch.setattr(os, "fsync", shim.around(os.fsync, lambda handle: os.fstat(handle).st_ino))
    elif operation == "link":
        patch.setattr(os, "link", shim.around(os.link))
    else:
        patch.setattr(Path, "replace", shim.around(Path.replace))
    return shim


@pytest.mark.parametrize("operation", ["fsync", "link", "rename"])
def test_every_call_may_fail(tmp_path: Path, operation: str) -> None:
    """The n-th call fails, for every n: an error that names the place, no file fsynced a second time, and a run after
    that ends with the same bytes."""
    with pytest.MonkeyPatch.context() as patch:
        calls = failing(patch, operation, 0)
        wanted = files_of(make_cache(tmp_path / "whole").root)
    assert calls.calls >= 4
    for moment in range(1, calls.calls + 1):
        root = tmp_path / str(moment)
        with pytest.MonkeyPatch.context() as patch:
            shim = failing(patch, operation, moment)
            with pytest.raises(
                CacheError, match=rf"^{root}.* cannot be written \(Input/output error\); mend it and run"
            ):
                make_cache(root)
        if operation == "fsync":
            folders = {folder.stat().st_ino for folder in (root, *root.rglob("*")) if folder.is_dir()}
            after = shim.synced[shim.moment - 1 :]
            assert shim.failed in folders or shim.failed not in after
        make_cache(root)
        assert verify(root).ok
        left = files_of(root)
        assert {name: left[name] for name in wanted} == wanted
        shutil.rmtree(root)


# ---------------------------------------------------------------------------------------------- power cuts


def entries(folder: Path) -> dict[str, int | None]:
    """Names in a folder, with the inodes of files and None of folders; other threads may remove some meanwhile."""
    found: dict[str, int | None] = {}
    for entry in folder.iterdir():
        with suppress(FileNotFoundError):
            found[entry.name] = None if entry.is_dir() else entry.stat().st_ino
    return found


class Disk:
    """What a power cut would leave of one folder, at the moment of every fsync."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self._root, self._sync = root, os.fsync
        self._contents: dict[int, bytes] = {}
        self._names: dict[Path, dict[str, int | None]] = {}
        self.moments: list[dict[str, bytes]] = []
        # Open, so that no other file gets the inode of one that was removed.
        self._open: list[int] = []
        weakref.finalize(self, lambda held: [os.close(handle) for handle in held], self._open)
        patch.setattr(os, "fsync", self._synced)

    def _synced(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            self._names[path] = entries(path)
        else:
            self._contents[os.fstat(handle).st_ino] = path.read_bytes()
            self._open.append(os.dup(handle))
        self._sync(handle)
        self.moments.append(self._left(self._root, ""))

    def _left(self, folder: Path, prefix: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for name, inode in self._names.get(folder, {}).items():
            if inode is None:
                found |= self._left(folder / name, f"{prefix}{name}/")
            else:
                found[f"{prefix}{name}"] = self._contents.get(inode, b"")
        return found


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_power_cut_at_any_moment(tmp_path: Path, container: ContainerKind) -> None:
    """What was not fsynced is lost, and the next run still ends with the same bytes: no name outlives its content."""
    whole = tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(whole, patch)
        make_cache(whole, container=container)
    wanted = files_of(whole)
    moments = [moment for number, moment in enumerate(disk.moments) if moment not in disk.moments[:number]]
    assert len(moments) >= 9
    assert moments[-1] == wanted
    for number, moment in enumerate(moments):
        root = tmp_path / str(number)
        for name, data in moment.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        if "plan.json" in moment:
            assert verify(root).ok
            assert verify(root).shards == sum(name.startswith("commits/") and name.endswith("json") for name in moment)
        make_cache(root, container=container)
        left = files_of(root)
        assert {name: left[name] for name in wanted} == wanted
        shutil.rmtree(root)


# ---------------------------------------------------------------------------------------------- reads


def test_reads_are_tried_again_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    real, calls = os.pread, []

    def flaky(handle: int, count: int, offset: int) -> bytes:
        """Two of three calls fail, the others give at most 70 bytes."""
        calls.append(offset)
        if len(calls) % READ_ATTEMPTS:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(handle, min(count, 70), offset)

    with path.open("rb") as file:
        monkeypatch.setattr(os, "pread", flaky)
        with pytest.raises(OSError, match="Input/output error"):
            read_at(file.fileno(), 20, 180)
        monkeypatch.setattr(os, "pread", lambda handle, count, offset: real(handle, min(count, 70), offset))
        assert read_at(file.fileno(), 20, 150) == bytes(range(20, 170))
        assert read_at(file.fileno(), 190, 50) == bytes(range(190, 200))
        assert read_at(file.fileno(), 0, 0) == b""


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_disk_that_cannot_read(tmp_path: Path, container: ContainerKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not taken for damage; shard and chunk are named. Short reads and a few failures are not even noticed."""
    made = make_cache(tmp_path / "cache", container=container)
    cache = open_cache(made.root)
    cache.codebook()
    cache.read_planes(cache.chunks[2])
    real, left = os.pread, [READ_ATTEMPTS - 1]

    def unwell(handle: int, count: int, offset: int) -> bytes:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(handle, max(1, count // 2), offset)

    monkeypatch.setattr(os, "pread", unwell)
    made.check(cache.read_blocks(3, 9), 3, 9)
    left[0] = 1 << 30
    again = open_cache(made.root)
    name = again.manifest.shards[0].file
    with pytest.raises(CacheError, match=rf"{name}.* cannot be read.*Input/output error") as caught:
        again.read_blocks(0, 3)
    assert not isinstance(caught.value, DamagedCacheError)
    with pytest.raises(CacheError, match=r", chunk \d cannot be read \(Input/output error, 3 times\); check the disk"):
        cache.read_planes(cache.chunks[0])
