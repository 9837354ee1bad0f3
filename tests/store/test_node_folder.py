"""The folder of fetched files: one fetch for all, a bound, and nothing taken from under a reader."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from logitcache.errors import CacheError
from logitcache.store import node_folder as module
from logitcache.store.node_folder import NodeFolder

FORK = multiprocessing.get_context("fork")
SIZE = 1000


def content(name: str, size: int = SIZE) -> bytes:
    """What the file `name` holds."""
    return (name.encode() * size)[:size]


def fetcher(name: str, fetched: list[str] | None = None, size: int = SIZE) -> Callable[[BinaryIO], None]:
    def fetch(file: BinaryIO) -> None:
        if fetched is not None:
            fetched.append(name)
        file.write(content(name, size))
        file.flush()

    return fetch


def hold(folder: NodeFolder, name: str, fetched: list[str] | None = None) -> Any:
    return folder.hold(f"cache/{name}", SIZE, fetcher(name, fetched))


def names(folder: NodeFolder) -> list[str]:
    return sorted(path.name for path in (folder.root / "cache").iterdir())


def test_a_file_is_fetched_once_and_then_found(tmp_path: Path) -> None:
    folder, fetched = NodeFolder(tmp_path / "local", 10 * SIZE), []
    for again in (False, True):
        lease = hold(folder, "a", fetched)
        assert lease.fresh is not again
        assert lease.path.read_bytes() == content("a")
        lease.close()
    assert fetched == ["a"]


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path, 3 * SIZE)
    for name in ("a", "b", "c", "a", "d"):
        hold(folder, name).close()
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 3 * SIZE
    assert names(folder) == ["a", "c", "d"]


def test_what_is_held_stays(tmp_path: Path) -> None:
    """Even over the bound; what is not held goes instead."""
    folder = NodeFolder(tmp_path, 2 * SIZE)
    first, second = hold(folder, "a"), hold(folder, "b")
    hold(folder, "c").close()
    assert names(folder) == ["a", "b", "c"]
    hold(folder, "d").close()
    assert names(folder) == ["a", "b", "d"]
    for lease in (first, second):
        lease.close()
    hold(folder, "e").close()
    assert names(folder) == ["d", "e"]


def test_a_full_disk_makes_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound may be larger than what is free."""
    folder = NodeFolder(tmp_path, 100 * SIZE)
    for name in ("a", "b"):
        hold(folder, name).close()

    def usage(_: Path) -> Any:
        taken = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
        return type("usage", (), {"free": 2 * SIZE - taken})

    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    hold(folder, "c").close()
    assert names(folder) == ["b", "c"]


def test_no_space_at_all_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CacheError, match=r"^no space to write .*about 1,000 bytes are needed.*LOGITCACHE_LOCAL_DIR"):
        hold(NodeFolder(tmp_path, 10 * SIZE), "a")
    assert names(NodeFolder(tmp_path, 0)) == []


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    def fails(file: BinaryIO) -> None:
        file.write(b"half")
        raise CacheError("the network is gone")

    folder = NodeFolder(tmp_path, 10 * SIZE)
    with pytest.raises(CacheError, match="the network is gone"):
        folder.hold("cache/a", SIZE, fails)
    assert names(folder) == []
    assert hold(folder, "a").path.read_bytes() == content("a")


def test_threads_share_one_fetch(tmp_path: Path) -> None:
    folder, fetched, read = NodeFolder(tmp_path, 10 * SIZE), [], []

    def work() -> None:
        lease = hold(folder, "a", fetched)
        read.append(lease.path.read_bytes())
        lease.close()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == ["a"]
    assert read == [content("a")] * 8


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_killed_fetch_blocks_nobody_and_is_not_used(tmp_path: Path) -> None:
    """The part has the full size already, and half the bytes."""
    begun, never = FORK.Event(), FORK.Event()
    folder = NodeFolder(tmp_path, 10 * SIZE)

    def half(file: BinaryIO) -> None:
        file.write(content("a")[:500])
        file.flush()
        begun.set()
        never.wait()

    child = FORK.Process(target=folder.hold, args=("cache/a", SIZE, half))
    child.start()
    begun.wait()
    assert names(folder) == ["a.0.part"]
    waiter: list[bytes] = []
    thread = threading.Thread(target=lambda: waiter.append(hold(folder, "a").path.read_bytes()))
    thread.start()
    os.kill(child.pid or 0, signal.SIGKILL)
    thread.join()
    child.join()
    assert waiter == [content("a")]
    assert names(folder) == ["a"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_what_the_dead_left_is_counted_and_removed(tmp_path: Path) -> None:
    begun, never = FORK.Event(), FORK.Event()
    folder = NodeFolder(tmp_path, 2 * SIZE)

    def half(_: BinaryIO) -> None:
        begun.set()
        never.wait()

    child = FORK.Process(target=folder.hold, args=("cache/a", SIZE, half))
    child.start()
    begun.wait()
    hold(folder, "b").close()
    hold(folder, "c").close()
    assert names(folder) == ["a.0.part", "c"]  # on its way, and so counted
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    hold(folder, "d").close()
    assert names(folder) == ["c", "d"]


def test_a_stopped_fetch_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And when it goes on it does no harm."""
    monkeypatch.setattr(module, "STALLED_SECONDS", 0.05)
    folder, begun, go_on = NodeFolder(tmp_path, 10 * SIZE), threading.Event(), threading.Event()

    def stops(file: BinaryIO) -> None:
        begun.set()
        go_on.wait()
        fetcher("a")(file)

    stopped = threading.Thread(target=lambda: folder.hold("cache/a", SIZE, stops).close())
    stopped.start()
    begun.wait()
    lease = hold(folder, "a")
    assert lease.fresh
    assert names(folder) == ["a", "a.0.part"]
    go_on.set()
    stopped.join()
    assert names(folder) == ["a"]
    assert lease.path.read_bytes() == content("a")
    lease._file.seek(0)
    assert lease._file.read() == content("a")
    lease.close()


def test_a_folder_removed_during_a_fetch(tmp_path: Path) -> None:
    """Who fetches and who waits for it both begin anew; what another has begun meanwhile keeps its name."""
    folder, begun, go_on, fetched = NodeFolder(tmp_path / "local", 10 * SIZE), threading.Event(), threading.Event(), []
    read: list[bytes] = []

    def fetch(file: BinaryIO) -> None:
        begun.set()
        go_on.wait()
        fetcher("a", fetched)(file)

    def work(fetch: Callable[[BinaryIO], None]) -> None:
        lease = folder.hold("cache/a", SIZE, fetch)
        read.append(lease.path.read_bytes())
        lease.close()

    threads = [threading.Thread(target=work, args=(how,)) for how in (fetch, fetcher("a", fetched))]
    threads[0].start()
    begun.wait()
    threads[1].start()
    shutil.rmtree(folder.root)
    go_on.set()
    for thread in threads:
        thread.join()
    assert read == [content("a")] * 2
    assert names(folder) == ["a"]
    assert 2 <= len(fetched) <= 3


def test_a_folder_removed_again_and_again(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path / "local", 10 * SIZE)
    with pytest.raises(CacheError, match=r"local/cache is removed again and again; set LOGITCACHE_LOCAL_DIR"):
        folder.hold("cache/a", SIZE, lambda _: shutil.rmtree(folder.root))


def test_a_folder_removed_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another made it at this moment, and it is gone before anybody sees what it is."""
    folder, make, met = NodeFolder(tmp_path / "local", 10 * SIZE), os.mkdir, []

    def outrun(path: Path, mode: int = 0o777) -> None:
        if Path(path).name == "cache" and not met:
            met.append(path)
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        make(path, mode)

    monkeypatch.setattr(os, "mkdir", outrun)
    lease = hold(folder, "a")
    assert lease.path.read_bytes() == content("a")
    lease.close()
    assert len(met) == 1


def test_a_removed_part_is_not_waited_for(tmp_path: Path) -> None:
    """Its owner, who has renamed it, holds it as a lease for as long as it reads."""
    part = tmp_path / "a.0.part"
    with part.open("wb") as owner, part.open("rb") as waiting:
        fcntl.flock(owner, fcntl.LOCK_EX)
        part.unlink()
        assert module._wait_for(waiting, part, tmp_path / "a")


def test_a_file_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlockable(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", unlockable)
    with pytest.raises(CacheError, match=r"cannot be locked \(No locks available\); set LOGITCACHE_LOCAL_DIR"):
        hold(NodeFolder(tmp_path, 10 * SIZE), "a")


BOUND, READERS = 3, 4


def _read_at_random(folder: NodeFolder, seed: int, wrong: Any, fetches: Any) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        name = f"file{rng.integers(0, 8)}"
        lease = hold(folder, name)
        fetches.value += lease.fresh
        with lease.path.open("rb") as file:  # the path is there as long as the lease is
            if file.read() != content(name):
                wrong.value += 1
        if sum(size for _, size, _ in folder._files()) > (BOUND + READERS) * SIZE:
            wrong.value += 1
        lease.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_readers_of_several_processes_while_files_are_evicted(tmp_path: Path) -> None:
    """Three of eight files fit: nearly every read evicts something that others may be about to read."""
    folder = NodeFolder(tmp_path, BOUND * SIZE)
    wrong, fetches = FORK.Value("i", 0), FORK.Value("i", 0)
    children = [FORK.Process(target=_read_at_random, args=(folder, seed, wrong, fetches)) for seed in range(READERS)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * READERS
    assert wrong.value == 0
    assert fetches.value > 40  # files did go and were fetched again
    hold(folder, "last").close()
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 3 * SIZE
