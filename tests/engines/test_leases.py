"""Leases: one holder at a time, taken over when the holder is gone, whatever any machine's clock says."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from logitcache.engines.leases import Leases, read_leases
from logitcache.engines.owner import known_dead, this_process
from logitcache.errors import CacheError
from tests.engines.dumps import elsewhere, let_expire
from tests.faults import forkserver, start

TERM = 60.0


def held(folder: Path) -> dict[str, int]:
    """Name and generation of the leases, presences left out."""
    return {lease.name: lease.generation for lease in read_leases(folder) if not lease.name.startswith("worker-")}


def test_nothing_is_written_before_a_claim_and_nothing_stays(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "work" / "leases"
    with Leases(folder) as leases:
        assert list(tmp_path.iterdir()) == []
        lease = leases.claim(["a"])
        assert lease is not None
        assert held(folder) == {"a": 0}
        leases.release(lease)
        assert held(folder) == {}
        leases.claim(["b"])
    assert list(tmp_path.iterdir()) == []


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    with Leases(tmp_path / "leases") as one, Leases(tmp_path / "leases") as two:
        first = one.claim(["a", "b"])
        second = two.claim(["a", "b"])
        assert first is not None
        assert second is not None
        assert (first.name, second.name) == ("a", "b")
        assert one.claim(["a", "b"]) is None
        with second:
            pass
        third = one.claim(["a", "b"])
        assert third is not None
        assert third.name == "b"


def test_many_claim_at_once(tmp_path: Path) -> None:
    """Eight workers, forty names: each is claimed by exactly one."""
    names = [f"unit-{number:06d}" for number in range(40)]
    won: list[str] = []
    barrier = threading.Barrier(8)

    def worker() -> None:
        with Leases(tmp_path / "leases") as leases:
            barrier.wait()
            while (lease := leases.claim(names)) is not None:
                won.append(lease.name)
            barrier.wait()

    threads = [threading.Thread(target=worker) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == names


def test_a_lease_that_is_not_renewed_is_taken_over_once(tmp_path: Path) -> None:
    """The owner, which was only stopped, keeps its file, disturbs nobody and leaves nothing."""
    folder = tmp_path / "leases"
    with elsewhere(Leases(folder, term=TERM)) as stopped, Leases(folder, term=TERM) as one, Leases(folder) as two:
        old = stopped.claim(["a"])
        assert old is not None
        assert one.claim(["a"]) is None
        let_expire(folder)
        new = one.claim(["a"])
        assert new is not None
        assert held(folder) == {"a": 1}
        assert two.claim(["a"]) is None
        # It goes on: its heartbeat reaches its own file only, and so does its release.
        touched = new.path.stat().st_mtime_ns
        stopped.beat()
        assert new.path.stat().st_mtime_ns == touched
        stopped.release(old)
        assert held(folder) == {"a": 1}
        assert two.claim(["a"]) is None
        one.release(new)
        assert held(folder) == {}


def test_the_new_holder_removes_what_the_old_one_left(tmp_path: Path) -> None:
    folder = tmp_path / "leases"
    with elsewhere(Leases(folder)) as stopped, Leases(folder) as other:
        old = stopped.claim(["a"])
        let_expire(folder)
        new = other.claim(["a"])
        assert old is not None
        assert new is not None
        other.release(new)
        assert held(folder) == {}
        stopped.beat()
        stopped.release(old)
        assert held(folder) == {}


def test_heartbeats_keep_a_lease(tmp_path: Path) -> None:
    folder = tmp_path / "leases"
    with elsewhere(Leases(folder)) as owner, Leases(folder) as other:
        owner.status = lambda: {"stage": "computing", "unit": 7}
        owner.claim(["a"])
        let_expire(folder)
        owner.beat()
        assert other.claim(["a"]) is None
        said = [lease.owner for lease in read_leases(folder) if "unit" in lease.owner]
        assert [(status["stage"], status["unit"]) for status in said] == [("computing", 7)]
        # A status that is shorter than the last one leaves no rest of that.
        owner.status = dict
        owner.beat()
        assert all("unit" not in lease.owner for lease in read_leases(folder))
        assert all(lease.owner for lease in read_leases(folder))


@pytest.mark.parametrize("skew", [-1e6, 1e6])
def test_clocks_of_machines_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float) -> None:
    """Neither does a skewed clock take a lease that is renewed, nor keep one that is not."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + skew)
    monkeypatch.setattr(time, "time_ns", lambda: int((real() + skew) * 1e9))
    folder = tmp_path / "leases"
    with elsewhere(Leases(folder)) as owner, Leases(folder) as other:
        owner.claim(["a"])
        assert other.claim(["a"]) is None
        let_expire(folder)
        assert other.claim(["a"]) is not None


class Interrupted:
    """The module `os`, where a signal that raises arrives during the third call of a function."""

    def __init__(self, name: str) -> None:
        self._name, self._calls = name, 0

    def __getattr__(self, name: str) -> Any:
        return self._call if name == self._name else getattr(os, name)

    def _call(self, *arguments: Any) -> Any:
        done = getattr(os, self._name)(*arguments)
        self._calls += 1
        if self._calls == 3:
            raise SystemExit(143)
        return done


@pytest.mark.parametrize("call", ["open", "pwrite", "link", "close"])
def test_a_signal_in_the_middle_leaves_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a claim, when the file is there and not noted, or of a release, when the file is no longer noted."""
    monkeypatch.setattr("logitcache.engines.leases.os", Interrupted(call))
    leases = Leases(tmp_path / "cache" / "work" / "leases")
    with pytest.raises(SystemExit), leases:
        claim_three(leases)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["close", "listdir"])
def test_a_signal_while_leaving_leaves_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that met an error gives its leases back, and is told to end meanwhile."""
    leases = Leases(tmp_path / "cache" / "work" / "leases")
    assert all(leases.claim([name]) for name in "abc")
    monkeypatch.setattr("logitcache.engines.leases.os", Interrupted(call))
    with pytest.raises(SystemExit), leases:
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def claim_three(leases: Leases) -> None:
    for name in "abc":
        lease = leases.claim([name])
        assert lease is not None
        leases.release(lease)


def hold(folder: Path, name: str) -> None:
    """In a child: claim, and be killed with it."""
    Leases(folder).claim([name])
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_owner_that_died_here_is_followed_at_once(tmp_path: Path) -> None:
    children = forkserver()
    child: Any = start(children, hold, tmp_path / "leases", "a")
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert held(tmp_path / "leases") == {"a": 0}
    with Leases(tmp_path / "leases") as leases:
        assert leases.claim(["a"]) is not None
        assert held(tmp_path / "leases") == {"a": 1}


def test_workers_that_are_gone_are_forgotten_by_the_next(tmp_path: Path) -> None:
    """Their claims are not: those are taken over."""
    folder = tmp_path / "leases"
    children = forkserver()
    child: Any = start(children, hold, folder, "a")
    child.join()
    with elsewhere(Leases(folder)) as living:
        living.claim(["b"])
        assert len([lease for lease in read_leases(folder) if lease.name.startswith("worker-")]) == 1
        let_expire(folder)
        with Leases(folder) as leases:
            leases.claim(["c"])
            assert len([lease for lease in read_leases(folder) if lease.name.startswith("worker-")]) == 1
            assert held(folder) == {"a": 0, "b": 0, "c": 0}


def test_who_is_known_to_be_dead() -> None:
    me = this_process()
    assert not known_dead(me)
    assert known_dead({**me, "started": "1"}), "another process has got the number"
    assert known_dead({**me, "pid": 1 << 30})
    assert not known_dead({**me, "pid": 1 << 30, "machine": "another machine"})
    assert not known_dead({**me, "pid": 1 << 30, "machine": ""})
    assert not known_dead({})


def test_a_file_that_is_just_written_is_held(tmp_path: Path) -> None:
    """Whose beginning has no owner, or half of one: a file system may show it so."""
    folder = tmp_path / "leases"
    folder.mkdir()
    (folder / "a.000000").touch()
    (folder / "b.000003").write_bytes(b'{"host": "x", "pi')
    (folder / "strange.tmp").touch()
    with Leases(folder) as leases:
        assert leases.claim(["a", "b"]) is None
        let_expire(folder)
        assert leases.claim(["a", "b"]) is not None
        assert leases.claim(["a", "b"]) is not None
        assert held(folder) == {"a": 1, "b": 4}


def test_once(tmp_path: Path) -> None:
    """One makes, all others wait and find."""
    made, found = [], []

    def make() -> str:
        made.append(threading.get_ident())
        (tmp_path / "it").write_text("made")
        return "made"

    def find() -> str | None:
        return (tmp_path / "it").read_text() if (tmp_path / "it").exists() else None

    def worker() -> None:
        with Leases(tmp_path / "leases", term=1) as leases:
            found.append(leases.once("thing", find, make))

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["made"] * 4
    assert len(made) == 1


def test_a_folder_that_is_swept_meanwhile(tmp_path: Path) -> None:
    """Who finishes the cache removes the leases; those who look once more find nothing and do no harm."""
    folder = tmp_path / "cache" / "work" / "leases"
    with Leases(folder) as one, Leases(folder) as two:
        one.claim(["a"])
        lease = two.claim(["b"])
        assert lease is not None
        for path in (*folder.iterdir(), folder, folder.parent):
            path.rmdir() if path.is_dir() else path.unlink()
        one.beat()
        two.release(lease)
        assert one.claim(["a"]) is not None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "leases").write_text("a file")
    with Leases(tmp_path / "leases") as leases, pytest.raises(CacheError, match=r"leases cannot be written \("):
        leases.claim(["a"])


def test_processes_that_spawn_are_seen(tmp_path: Path) -> None:
    """The owner that a lease names is the process that holds it."""
    with Leases(tmp_path / "leases", label="7") as leases:
        leases.claim(["a"])
        [lease] = [lease for lease in read_leases(tmp_path / "leases") if lease.name == "a"]
        assert lease.owner["pid"] == os.getpid() == multiprocessing.current_process().pid
        assert lease.owner["label"] == "7"
