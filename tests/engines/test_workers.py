"""Several workers, one dump: the bytes of a dump by one, whoever is killed, stopped, late or first."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from logitcache.engines.leases import Leases
from logitcache.engines.watch import snapshot
from logitcache.engines.worker import lease_of
from logitcache.errors import CacheError, DamagedCacheError
from logitcache.store import CacheWriter, Identity, Layout, open_cache, verify
from tests.engines.dumps import await_state, await_stop, content, dump, elsewhere, let_expire, options
from tests.faults import forkserver, run_killed, run_to_end, start
from tests.store.caches import files_of

children = forkserver()


def test_workers_share_the_units(place: Path, whole: Path, tmp_path: Path) -> None:
    """Every token is computed once, by one of three."""
    root = tmp_path / "cache"
    logs = [tmp_path / str(number) for number in range(3)]
    workers = [start(children, dump, options(place, root), log) for log in logs]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert content(root) == content(whole)
    assert sum(int(log.read_text()) for log in logs) == open_cache(root).num_tokens


def test_a_worker_of_a_finished_dump_has_nothing_to_do(place: Path, whole: Path, tmp_path: Path) -> None:
    before = files_of(whole)
    run_to_end(children, dump, options(place, whole), tmp_path / "log")
    assert (tmp_path / "log").read_text() == "0"
    assert files_of(whole) == before


@pytest.mark.parametrize(
    "failpoint", ["commit.before_write", "commit.after_write", "commit.after_rename", "commit.before_link"]
)
def test_a_worker_stopped_past_its_lease_then_continued(
    place: Path, whole: Path, tmp_path: Path, failpoint: str
) -> None:
    """Another takes its unit and finishes the cache; it goes on, commits nothing and ends in peace."""
    root = tmp_path / "cache"
    given = options(place, root)
    stopped: Any = start(children, dump, given, failpoint=f"{failpoint}:stop")
    try:
        await_stop(stopped.pid)
        let_expire(Layout(root).leases)
        run_to_end(children, dump, given, tmp_path / "log")
        assert int((tmp_path / "log").read_text()) == open_cache(root).num_tokens
        assert content(root) == content(whole)
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    stopped.join()
    assert stopped.exitcode == 0
    assert content(root) == content(whole)
    assert verify(root).ok


def test_the_lease_of_a_living_worker_is_waited_for(place: Path, whole: Path, tmp_path: Path) -> None:
    """Somebody elsewhere holds the last unit: the others are done, and it is taken when its owner goes silent."""
    root = tmp_path / "cache"
    last = open_cache(whole).manifest.identity.geometry.num_units - 1
    with elsewhere(Leases(Layout(root).leases)) as other:
        other.claim([lease_of(last)])
        worker: Any = start(children, dump, options(place, root))
        seen = await_state(root, lambda seen: seen.committed_units == last)
        assert not seen.complete
        await_state(root, lambda seen: any(state.stage == "waiting" for state in seen.workers))
        assert worker.is_alive()
        let_expire(Layout(root).leases)
        worker.join()
    assert worker.exitcode == 0
    assert content(root) == content(whole)


def test_the_tables_are_made_by_one_and_awaited_by_others(place: Path, whole: Path, tmp_path: Path) -> None:
    """Without unit 0 there are none; whoever waits for them with its rows computed makes them in the end."""
    root = tmp_path / "cache"
    with elsewhere(Leases(Layout(root).leases)) as other:
        claimed = other.claim([lease_of(0)])
        assert claimed is not None
        workers: list[Any] = [start(children, dump, options(place, root)) for _ in range(2)]
        seen = await_state(root, lambda seen: {1, 2} <= {state.unit for state in seen.workers if state.unit})
        await_state(root, lambda seen: sum(state.stage == "waiting" for state in seen.workers) == 2)
        assert seen.committed_units == 0
        assert not Layout(root).codebook.exists()
        other.release(claimed)
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
    assert content(root) == content(whole)


def test_tables_that_are_gone(place: Path, whole: Path, tmp_path: Path) -> None:
    """Committed units were encoded with them: no others are made."""
    root = tmp_path / "cache"
    given = options(place, root)
    run_killed(children, dump, given, failpoint="commit.after_link")
    Layout(root).codebook.unlink()
    from logitcache.dump import run_dump

    with pytest.raises(DamagedCacheError, match=r"tables.zarr.zip is missing; restore it, or run logitcache repair"):
        run_dump(given)
    assert not Layout(root).codebook.exists()


def test_one_tokenises_and_the_others_wait(place: Path, whole: Path, tmp_path: Path) -> None:
    """Neither does a dead tokeniser's half of a file stand in the way."""
    root = tmp_path / "cache"
    layout = Layout(root)
    with Leases(layout.leases) as other:
        claimed = other.claim(["tokens"])
        assert claimed is not None
        (layout.work / "tokens.bin.1.tmp").write_bytes(b"half")
        worker: Any = start(children, dump, options(place, root))
        await_state(root, lambda seen: any(state.stage == "tokenising" for state in seen.workers))
        assert not layout.plan.exists()
        assert not (layout.work / "tokens.bin").exists()
        let_expire(layout.leases)
        elsewhere(other)
        worker.join()
    assert worker.exitcode == 0
    assert content(root) == content(whole)


def test_outputs_of_one_dump_are_shared_too(place: Path, whole: Path, tmp_path: Path) -> None:
    given = options(place, tmp_path / "a", ("top-k:5", tmp_path / "b"))
    run_to_end(children, dump, options(place, tmp_path / "alone", ("top-k:5", tmp_path / "alone-b")))
    workers: list[Any] = [start(children, dump, given) for _ in range(2)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert content(tmp_path / "a") == content(whole)
    assert content(tmp_path / "b") == content(tmp_path / "alone-b")


def test_a_failure_that_another_worker_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that fails is an error, unless the unit is committed by then."""
    from tests.store.caches import commit, identity
    from tests.store.caches import content as rows

    plan: Identity = identity()
    tokens, targets = rows()
    slow, fast = (CacheWriter.open(tmp_path / "cache", plan) for _ in range(2))
    commit(fast, 1, tokens, targets)

    def swept(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory", str(tmp_path / "cache" / "shards" / "x.tmp"))

    monkeypatch.setattr("logitcache.store.writer.write_container", swept)
    assert commit(slow, 1, tokens, targets) == 0
    with pytest.raises(CacheError, match=r"cannot be written \(No such file"):
        commit(slow, 0, tokens, targets)


def test_a_view_of_what_is_no_dump(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"holds no cache and no dump writes one there; check the spelling$"):
        snapshot([tmp_path])
