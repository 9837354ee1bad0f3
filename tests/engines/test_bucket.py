"""Dumps to a bucket: the bytes of a dump to a folder, whoever is killed, late, or on which machine."""

from __future__ import annotations

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
