"""Dumps to a bucket: the bytes of a dump to a folder, whoever is killed, late, or on which machine."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from logitcache.dump import DumpOptions, Output
from logitcache.engines.bucket_leases import BucketLeases
from logitcache.engines.local import run_local
from logitcache.engines.watch import snapshot
from logitcache.engines.worker import run_worker
from logitcache.errors import CacheError, RemoteError
from logitcache.progress import Silent, Snapshot
from logitcache.selection import Selection
from logitcache.store import open_cache, verify
from logitcache.store.objects import open_bucket
from tests.engines.dumps import LENGTH, dump, elsewhere, make_place, options
from tests.faults import forkserver, run_killed, run_to_end, start
from tests.s3 import Proxy
from tests.store.buckets import empty_place, there, written
from tests.store.caches import files_of

children = forkserver()
# Fewer requests.
UNIT, UNITS = 15 * LENGTH, 5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, bytes]:
    """The files of the same dump to a folder."""
    run_to_end(children, dump, options(place, place / "whole", unit_tokens=UNIT))
    return files_of(place / "whole")


@pytest.fixture
def url(proxy: Proxy) -> str:
    """An empty place."""
    return empty_place(proxy)


def to_bucket(place: Path, url: str, staging: Path, **changes: Any) -> DumpOptions:
    """The dump of `options`, to a bucket, in larger units."""
    given = options(place, place, **{"unit_tokens": UNIT, **changes})
    return DumpOptions(**{**vars(given), "outputs": (Output.at(Selection.parse("sample:7"), url, staging),)})


def dump_there(environment: dict[str, str], given: DumpOptions, log: Path | None = None) -> None:
    """`dump`, with what is needed to reach the bucket: the processes that children fork from do not know it."""
    os.environ.update(environment)
    dump(given, log)


def environment() -> dict[str, str]:
    """Of a child."""
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "NO_PROXY", "LOGITCACHE_L"))}


def test_the_bytes_of_a_dump_to_a_folder(
    place: Path, whole: dict[str, bytes], url: str, proxy: Proxy, tmp_path: Path
) -> None:
    given = to_bucket(place, url, tmp_path / "staging")
    run_to_end(children, dump_there, environment(), given, tmp_path / "log")
    assert written(proxy, url) == whole
    assert verify(url).ok
    assert list((tmp_path / "staging").iterdir()) == []
    assert int((tmp_path / "log").read_text()) == open_cache(url).num_tokens
    # A finished one has nothing to do.
    run_to_end(children, dump_there, environment(), given, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "0"
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize("failpoint", ["bucket.shard_sent", "bucket.before_manifest"])
def test_a_kill_at_a_failpoint(
    failpoint: str, place: Path, whole: dict[str, bytes], url: str, proxy: Proxy, tmp_path: Path
) -> None:
    """Nothing that is half there counts, and another machine, which has nothing of the first, goes on."""
    run_killed(children, dump_there, environment(), to_bucket(place, url, tmp_path / "one"), failpoint=failpoint)
    found = there(proxy, url)
    units = [name for name in whole if name.startswith("commits/")]
    expected = 0 if failpoint == "bucket.shard_sent" else len(units)
    assert sum(name.startswith("commits/") for name in found) == expected
    proxy.log.clear()
    run_to_end(children, dump_there, environment(), to_bucket(place, url, tmp_path / "two"), tmp_path / "log")
    assert int((tmp_path / "log").read_text()) == _tokens_of(whole, missing=expected)
    assert proxy.count("PUT .*/commits/") == len(units) - expected
    assert written(proxy, url) == whole
    assert verify(url).ok
    # What the killed run left on the first machine stands in nobody's way.
    run_to_end(children, dump_there, environment(), to_bucket(place, url, tmp_path / "one"))
    assert list((tmp_path / "one").iterdir()) == []


def _tokens_of(files: dict[str, bytes], missing: int) -> int:
    """Tokens of all units but the first `missing`."""
    commits = sorted(name for name in files if name.startswith("commits/"))[missing:]
    return sum(json.loads(files[name])["num_tokens"] for name in commits)


def test_a_bucket_that_refuses_in_the_middle(
    place: Path, whole: dict[str, bytes], url: str, proxy: Proxy, tmp_path: Path
) -> None:
    given = to_bucket(place, url, tmp_path / "staging")
    refusal = proxy.fail("PUT .*/shards/000002", status=403)
    with pytest.raises(RemoteError, match=r"; what is committed stays, and the same command resumes$"):
        run_worker(given, Silent())
    assert refusal.met
    proxy.faults.clear()
    assert run_worker(given, Silent()).computed_tokens == _tokens_of(whole, missing=2)
    assert written(proxy, url) == whole


def test_a_shard_of_a_finished_cache_is_gone(
    place: Path, whole: dict[str, bytes], url: str, proxy: Proxy, tmp_path: Path
) -> None:
    """Its unit alone is computed again, though nothing was kept to compute it from."""
    given = to_bucket(place, url, tmp_path / "staging")
    run_to_end(children, dump_there, environment(), given)
    shard = max(name for name in whole if name.startswith("shards/"))
    proxy.raw("DELETE", f"/{url.removeprefix('s3://')}/{shard}")
    run_to_end(children, dump_there, environment(), given, tmp_path / "log")
    assert int((tmp_path / "log").read_text()) == _tokens_of(whole, missing=UNITS - 1)
    assert written(proxy, url) == whole


# ------------------------------------------------------------------------------------------------- several workers


def test_workers_of_several_machines_share_the_units(
    place: Path, whole: dict[str, bytes], url: str, proxy: Proxy, tmp_path: Path
) -> None:
    """They see each other in the bucket alone: every token is computed once, every unit committed once."""
    logs = [tmp_path / str(number) for number in range(2)]
    workers = [
        start(children, dump_there, environment(), to_bucket(place, url, tmp_path / f"staging-{log.name}"), log)
        for log in logs
    ]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert written(proxy, url) == whole
    assert sum(int(log.read_text()) for log in logs) == _tokens_of(whole, missing=0)
    assert proxy.count("PUT .*/shards/") == proxy.count("PUT .*/commits/") == UNITS


class Informed:
    """A context whose processes have this one's environment."""

    Pipe = staticmethod(children.Pipe)

    def Process(self, target: Any, args: tuple[Any, ...], **more: Any) -> Any:
        process: Any = children
        return process.Process(target=_informed, args=(environment(), target, args), **more)


def _informed(variables: dict[str, str], target: Any, arguments: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    target(*arguments)


class Noted(Silent):
    """Remembers what was said and shown."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.seen: list[Snapshot] = []

    def note(self, what: str) -> None:
        self.said.append(what)

    def workers(self, seen: Snapshot) -> None:
        self.seen.append(seen)


def test_a_worker_of_one_machine_dies(
    place: Path, whole: dict[str, bytes], url: str, proxy: Proxy, tmp_path: Path
) -> None:
    """`--workers 2`: whoever is started in its place takes its unit at once."""
    gate, noted = threading.Event(), Noted()
    fault = proxy.fail("PUT .*/shards/000001", until=gate, status=503)

    def kill() -> None:
        fault.reached.wait()
        said = proxy.raw("GET", f"/{url.removeprefix('s3://')}/work/leases/unit-000001.000000")
        os.kill(json.loads(said)["pid"], signal.SIGKILL)
        gate.set()

    killer = threading.Thread(target=kill)
    killer.start()
    report = run_local(to_bucket(place, url, tmp_path / "staging", workers=2), noted, cast(Any, Informed()))
    killer.join()
    assert report.computed_tokens == report.tokens == _tokens_of(whole, missing=0)
    assert [re.sub(r"\d", "N", said) for said in noted.said] == [
        "worker N died (SIGKILL) and is started again; its unit is computed again"
    ]
    assert written(proxy, url) == whole
    assert list((tmp_path / "staging").iterdir()) == []


def test_leases_in_a_bucket(url: str, proxy: Proxy) -> None:
    """Claimed once; taken over from who shows no life by the bucket's clock; nothing is left behind."""
    objects = open_bucket(url)
    with elsewhere(BucketLeases(objects, "0")) as one, BucketLeases(objects, "1") as two:
        lease = one.claim(["unit-000000", "unit-000001"])
        assert lease is not None
        assert lease.name == "unit-000000"
        second = two.claim(["unit-000000", "unit-000001"])
        assert second is not None
        assert second.name == "unit-000001"
        assert two.claim(["unit-000000", "unit-000001"]) is None
        one.status = lambda: {"stage": "computing", "unit": 0}
        one.beat()
        with pytest.raises(CacheError, match="holds no cache and no dump writes one there"):
            snapshot([url])
        late = Late(objects, "2")
        taken = late.claim(["unit-000000"])
        assert taken is not None
        assert (taken.name, taken.generation) == ("unit-000000", 1)
        one.release(lease)  # which takes nothing from its new owner
        one.beat()
        assert two.claim(["unit-000000"]) is None
        names = set(there(proxy, url))
        assert {"work/leases/unit-000000.000001", "work/leases/unit-000001.000000"} <= names
        assert "work/leases/unit-000000.000000" not in names
        with late:
            pass
        assert two.claim(["unit-000000"]) is not None
    assert there(proxy, url) == {}


class Late(BucketLeases):
    """An hour later."""

    def _clock(self) -> float:
        return super()._clock() + 3600


@pytest.mark.parametrize("fault", [{"lose": True}, {"status": 500}], ids=str)
def test_a_claim_whose_answer_is_lost(fault: dict[str, Any], url: str, proxy: Proxy) -> None:
    with BucketLeases(open_bucket(url)) as leases:
        proxy.fail("PUT .*/leases/", times=1, **fault)
        proxy.fail("PUT .*/leases/unit", times=1, **fault)
        assert leases.claim(["unit-000000"]) is not None
    assert all(fault.met for fault in proxy.faults)


def test_the_view(place: Path, url: str, proxy: Proxy, tmp_path: Path) -> None:
    """Workers of all machines, seen in the bucket."""
    gate = threading.Event()
    fault = proxy.fail("PUT .*/commits/000002", until=gate)
    worker: Any = start(children, dump_there, environment(), to_bucket(place, url, tmp_path / "staging"))
    fault.reached.wait()
    seen = snapshot([url])
    assert (seen.cache, seen.complete, seen.committed_units, seen.total_units) == (url, False, 2, UNITS)
    assert [(state.pid, state.stage) for state in seen.workers] == [(worker.pid, "starting")]
    gate.set()
    worker.join()
    seen = snapshot([url])
    assert (seen.complete, seen.committed_units, seen.workers) == (True, UNITS, [])
