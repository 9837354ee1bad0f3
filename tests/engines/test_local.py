"""Workers that this process starts: what they make, what happens when one dies, and that none outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from logitcache.engines.leases import Leases, read_leases
from logitcache.engines.local import _portable, run_local
from logitcache.engines.owner import known_dead
from logitcache.engines.worker import UNIT_PREFIX, lease_of
from logitcache.errors import CacheError, DamagedCacheError, PlanMismatchError, UsageError
from logitcache.progress import Silent, Snapshot
from logitcache.store import Layout, open_cache, verify
from tests.engines.dumps import await_state, content, dump, elsewhere, options
from tests.faults import forkserver, run_to_end, start
from tests.store.caches import files_of

children = forkserver()


class Watched(Silent):
    """Remembers what was said, and does `act` whenever it is shown the workers."""

    def __init__(self, act: Callable[[Snapshot], None] | None = None) -> None:
        self.said: list[str] = []
        self.seen: list[Snapshot] = []
        self._act = act

    def note(self, what: str) -> None:
        self.said.append(what)

    def workers(self, seen: Snapshot) -> None:
        self.seen.append(seen)
        if self._act is not None:
            self._act(seen)


@contextmanager
def unfinished(root: Path, whole: Path) -> Iterator[Leases]:
    """Somebody elsewhere holds the last unit, so that the dump cannot end by itself."""
    last = open_cache(whole).manifest.identity.geometry.num_units - 1
    with elsewhere(Leases(Layout(root).leases)) as other:
        assert other.claim([lease_of(last)]) is not None
        yield other


def owners(root: Path) -> list[dict[str, Any]]:
    """Who holds a lease or shows presence, this process left out."""
    return [lease.owner for lease in read_leases(Layout(root).leases) if lease.owner.get("pid") != os.getpid()]


def test_two_workers(place: Path, whole: Path, tmp_path: Path) -> None:
    progress = Watched()
    report = run_local(options(place, tmp_path / "cache", workers=2), progress, children)
    assert content(tmp_path / "cache") == content(whole)
    assert report.manifests == [open_cache(whole).manifest]
    assert report.tokens == report.computed_tokens == open_cache(whole).num_tokens
    assert progress.said == []
    again = run_local(options(place, tmp_path / "cache", workers=2), progress, children)
    assert again.computed_tokens == 0
    assert content(tmp_path / "cache") == content(whole)


def test_a_worker_that_dies_is_started_again(place: Path, whole: Path, tmp_path: Path) -> None:
    """It is said once, its unit is computed again, and the dump ends as it should."""
    root = tmp_path / "cache"
    killed: list[int] = []
    with unfinished(root, whole) as other:

        def kill_one(seen: Snapshot) -> None:
            # One with a unit, or where they are quicker than this look one that waits for the unit held elsewhere.
            leases = sorted(read_leases(Layout(root).leases), key=lambda lease: not lease.name.startswith(UNIT_PREFIX))
            pids = [lease.owner["pid"] for lease in leases if lease.owner.get("pid") not in (None, os.getpid())]
            if pids and not killed:
                killed.append(pids[0])
                os.kill(pids[0], signal.SIGKILL)
            elif killed and progress.said:
                other.__exit__(None, None, None)

        progress = Watched(kill_one)
        report = run_local(options(place, root, workers=2), progress, children)
    assert len(progress.said) == 1
    assert progress.said[0].endswith("died (SIGKILL) and is started again; its unit is computed again")
    assert report.tokens == open_cache(whole).num_tokens
    assert content(root) == content(whole)


def test_workers_that_die_again_and_again(place: Path, tmp_path: Path) -> None:
    """The run ends with what to do, not with endless restarts."""
    root = tmp_path / "cache"

    def kill_all(seen: Snapshot) -> None:
        for owner in owners(root):
            if not known_dead(owner):
                os.kill(owner["pid"], signal.SIGKILL)

    # They must die before they commit anything: somebody elsewhere holds what comes first.
    with elsewhere(Leases(Layout(root).leases)) as other:
        other.claim(["tokens"])
        progress = Watched(kill_all)
        with pytest.raises(CacheError, match=r"every worker of .* died again and again, .* run the same command again"):
            run_local(options(place, root, workers=2), progress, children)
    assert sum("is started again" in said for said in progress.said) == 4
    assert sum("died 3 times (SIGKILL); the others go on without it" in said for said in progress.said) == 2


def test_an_error_of_a_worker_is_that_of_the_dump(place: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    before = files_of(tmp_path / "cache")
    with pytest.raises(PlanMismatchError, match=r"\n  --seed: the cache has 3, this run 4") as caught:
        run_local(options(place, tmp_path / "cache", workers=2, seed=4), Silent(), children)
    assert caught.value.differences == [("seed", 3, 4)]
    assert files_of(tmp_path / "cache") == before


class Unportable(Exception):
    """Cannot be made again from what it says."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (DamagedCacheError("x is damaged", shard="x", chunk=3), DamagedCacheError, r"^x is damaged$"),
        (UsageError("no"), UsageError, r"^no$"),
        (MemoryError(), MemoryError, r"^$"),
        (Unportable(1, 2), RuntimeError, r"^Unportable: 1 and 2$"),
    ],
)
def test_errors_reach_the_parent(error: Exception, kind: type[Exception], said: str) -> None:
    """As they are, with what they know; or else at least what they say."""
    sent = pickle.loads(pickle.dumps(_portable(error)))
    assert type(sent) is kind
    assert re.search(said, str(sent))
    assert getattr(sent, "__dict__", {}) == (error.__dict__ if kind is type(error) else {})


def test_an_interrupt_ends_all_workers(place: Path, whole: Path, tmp_path: Path) -> None:
    """They give their leases back, and the same call goes on."""
    root = tmp_path / "cache"
    pids = []
    with unfinished(root, whole):

        def interrupt(seen: Snapshot) -> None:
            if seen.committed_units > 2:
                pids.extend(owner["pid"] for owner in owners(root))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_local(options(place, root, workers=2), Watched(interrupt), children)
        assert pids
        assert owners(root) == []
    run_local(options(place, root, workers=2), Silent(), children)
    assert content(root) == content(whole)


def test_a_worker_that_does_not_end_is_killed_and_leaves_nothing(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears no signal but the last one; what it claimed is free at once."""
    root = tmp_path / "cache"
    stopped: list[int] = []
    monkeypatch.setattr("logitcache.engines.local._ENDING_SECONDS", 1.0)
    with unfinished(root, whole) as other:

        def interrupt(seen: Snapshot) -> None:
            if seen.committed_units > 2:
                stopped.append(owners(root)[0]["pid"])
                os.kill(stopped[0], signal.SIGSTOP)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_local(options(place, root, workers=2), Watched(interrupt), children)
        assert not Path(f"/proc/{stopped[0]}").exists()
        left = {path.name for path in Layout(root).leases.iterdir()}
        assert left == {f"{lease.name}.{lease.generation:06d}" for lease in read_leases(other.folder)}
        assert owners(root) == []
    run_local(options(place, root, workers=2), Silent(), children)
    assert content(root) == content(whole)


def run_two(given: Any) -> None:
    """In a child, which is killed: the parent of two workers. It has imported all and run nothing, so it may fork."""
    run_local(given, Silent(), multiprocessing.get_context("fork"))


def test_no_worker_outlives_its_parent(place: Path, whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    with unfinished(root, whole):
        parent: Any = start(children, run_two, options(place, root, workers=2))
        await_state(root, lambda seen: seen.committed_units > 2)
        left = owners(root)
        assert left
        os.kill(parent.pid, signal.SIGKILL)
        parent.join()
        await_state(root, lambda seen: all(known_dead(owner) for owner in left))
    run_to_end(children, dump, options(place, root))
    assert content(root) == content(whole)


def run_two_with_a_limit(given: Any, limit: int) -> None:
    """In a child: no file may grow over `limit` bytes, as under a quota, and two workers run into it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(CacheError, match=r" cannot be written: a file may not grow so large .* it resumes$"):
        run_two(given)


def test_no_space_for_two_workers(place: Path, whole: Path, tmp_path: Path) -> None:
    """The first one that meets it ends both; what was committed is whole, and the same dump goes on from there."""
    root = tmp_path / "cache"
    sizes = sorted(shard.num_bytes for shard in open_cache(whole).manifest.shards)
    given = options(place, root, workers=2)
    run_to_end(children, run_two_with_a_limit, given, sizes[len(sizes) // 2])
    assert owners(root) == []
    assert not list(root.rglob("*.tmp"))
    assert not (root / "manifest.json").exists()
    assert verify(root).ok
    run_to_end(children, dump, options(place, root))
    assert content(root) == content(whole)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_real_command_that_is_stopped(
    sent: signal.Signals, status: int, place: Path, whole: Path, tmp_path: Path
) -> None:
    """The whole group of processes hears the signal, as from a terminal or a batch system: one sentence, nobody left,
    and the same dump goes on from there."""
    root = tmp_path / "cache"
    given = options(place, root)
    command = [sys.executable, "-m", "logitcache.cli.main", "dump", "--teacher", given.teacher, "--corpus"]
    command += [*given.corpus, "--out", str(root), "--select", "sample:7", "--block-length", "16", "--seed", "3"]
    command += ["--batch-tokens", "48", "--unit-tokens", "96", "--device", "cpu", "--workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with unfinished(root, whole):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        await_state(root, lambda seen: seen.committed_units > 2, process)
        os.killpg(process.pid, sent)
        _, said = process.communicate()
        assert process.returncode == status, said
        assert "Traceback" not in said
        assert said.strip().endswith("the same command goes on from there")
        assert owners(root) == [], said
    run_to_end(children, dump, given)
    assert content(root) == content(whole)
