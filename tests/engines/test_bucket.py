"""Dumps to a bucket: the bytes of a dump to a folder, whoever is killed, late, or on which machine."""

from __future__ import annotations

import json
import os
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from logitcache.dump import DumpOptions, Output
from logitcache.engines.worker import run_worker
from logitcache.errors import CacheError, PlanMismatchError, RemoteError
from logitcache.progress import Silent
from logitcache.selection import Selection
from logitcache.store import open_cache, pull, push, verify
from tests.engines.dumps import dump, make_place, options
from tests.faults import forkserver, run_killed, run_to_end, start
from tests.s3 import Proxy
from tests.store.caches import files_of

children = forkserver()
BUCKETS = count()
CARD = "README.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, bytes]:
    """The files of the same dump to a folder."""
    run_to_end(children, dump, options(place, place / "whole"))
    return files_of(place / "whole")


@pytest.fixture
def url(proxy: Proxy) -> str:
    """An empty place."""
    return f"{proxy.bucket(f'dumps{next(BUCKETS)}')}/caches/one"


def to_bucket(place: Path, url: str, staging: Path, **changes: Any) -> DumpOptions:
    """The dump of `options`, to a bucket."""
    given = options(place, place, **changes)
    return DumpOptions(
        **{**vars(given), "outputs": (Output.at(Selection.parse("sample:7"), url, staging),)}
    )


def dump_there(environment: dict[str, str], given: DumpOptions, log: Path | None = None) -> None:
    """`dump`, with what is needed to reach the bucket: the processes that children fork from do not know it."""
    os.environ.update(environment)
    dump(given, log)


def environment() -> dict[str, str]:
    """Of a child."""
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "NO_PROXY", "LOGITCACHE_L"))}


def there(proxy: Proxy, url: str) -> dict[str, bytes]:
    """All objects at a place."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    listed = proxy.raw("GET", f"/{bucket}?list-type=2&prefix={prefix}/").decode()
    keys = re.findall("<Key>(.*?)</Key>", listed)
    return {key.removeprefix(f"{prefix}/"): proxy.raw("GET", f"/{bucket}/{key}") for key in keys}


def test_the_bytes_of_a_dump_to_a_folder(
    place: Path, whole: dict[str, bytes], url: str, proxy: Proxy, tmp_path: Path
) -> None:
    given = to_bucket(place, url, tmp_path / "staging")
    run_to_end(children, dump_there, environment(), given, tmp_path / "log")
    found = there(proxy, url)
    assert found.pop(CARD).startswith(b"---\n")
    assert found == whole
    assert verify(url).ok
    assert list((tmp_path / "staging").iterdir()) == []
    assert int((tmp_path / "log").read_text()) == open_cache(url).num_tokens
    # A finished one has nothing to do.
    run_to_end(children, dump_there, environment(), given, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "0"
    assert list((tmp_path / "staging").iterdir()) == []


FAILPOINTS = {
    "plan.written": 0,
    "codebook.written": 0,
    "bucket.before_upload": 0,
    "bucket.shard_sent": 0,
    "bucket.committed": 1,
    "bucket.before_manifest": None,
    "bucket.manifest_written": None,
}


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_kill_at_a_failpoint(
    failpoint: str, place: Path, whole: dict[str, bytes], url: str, proxy: Proxy, tmp_path: Path
) -> None:
    """Nothing that is half there counts, and another machine, which has nothing of the first, goes on."""
    run_killed(children, dump_there, environment(), to_bucket(place, url, tmp_path / "one"), failpoint=failpoint)
    found = there(proxy, url)
    units = [name for name in whole if name.startswith("commits/")]
    expected = len(units) if FAILPOINTS[failpoint] is None else FAILPOINTS[failpoint]
    assert sum(name.startswith("commits/") for name in found) == expected
    assert ("manifest.json" in found) == (failpoint == "bucket.manifest_written")
    if "manifest.json" not in found:
        with pytest.raises(CacheError, match="is unfinished; run the `logitcache dump` that began it again"):
            open_cache(url)
    proxy.log.clear()
    run_to_end(children, dump_there, environment(), to_bucket(place, url, tmp_path / "two"), tmp_path / "log")
    assert int((tmp_path / "log").read_text()) == _tokens_of(whole, missing=expected)
    assert proxy.count("PUT .*/commits/") == len(units) - expected
    found = there(proxy, url)
    del found[CARD]
    assert found == whole
    assert verify(url).ok
    # What the killed run left on the first machine stands in nobody's way.
    run_to_end(children, dump_there, environment(), to_bucket(place, url, tmp_path / "one"))
    assert list((tmp_path / "one").iterdir()) == []


def _tokens_of(files: dict[str, bytes], missing: int) -> int:
    """Tokens of all units but the first `missing`."""
    commits = sorted(name for name in files if name.startswith("commits/"))[missing:]
    return sum(json.loads(files[name])["num_tokens"] for name in commits)


FAULTS = [{"status": 500}, {"status": 503}, {"lose": True}, {"flip_sent": 40}]
WRITTEN = ("plan.json", "codebook/", "shards/", "commits/", "manifest.json")


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_what_passes_is_survived(
    fault: dict[str, Any], place: Path, whole: dict[str, bytes], url: str, proxy: Proxy, tmp_path: Path
) -> None:
    """An answer that is lost, too, whose request the server has carried out; and bytes changed on their way."""
    for name in WRITTEN:
        proxy.fail(f"PUT .*/{name}", **fault)
    if "status" in fault:
        proxy.fail("PUT .*/commits/", status=409)
        proxy.fail("GET .*list-type", **fault)
        proxy.fail("HEAD", **fault)
    run_to_end(children, dump_there, environment(), to_bucket(place, url, tmp_path / "staging"))
    assert all(fault.met for fault in proxy.faults)
    found = there(proxy, url)
    del found[CARD]
    assert found == whole


def test_an_outage_ends_the_run_which_goes_on_later(
    place: Path, whole: dict[str, bytes], url: str, proxy: Proxy, tmp_path: Path
) -> None:
    given = to_bucket(place, url, tmp_path / "staging")
    outage = proxy.fail("PUT .*/commits/000002", status=500, times=99)
    with pytest.raises(RemoteError, match=r"commits/000002.json cannot be written: .* answers 500 .*again and again"):
        run_worker(given, Silent())
    outage.times = 0
    run_to_end(children, dump_there, environment(), given, tmp_path / "log")
    assert int((tmp_path / "log").read_text()) == _tokens_of(whole, missing=2)
    assert open_cache(url).is_whole
