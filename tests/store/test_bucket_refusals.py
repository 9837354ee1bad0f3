"""Writing a cache into a bucket: never over something else, nor beside a copy."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitcache.errors import CacheError, PlanMismatchError, RemoteError, UsageError
from logitcache.store import check_place, push, verify
from tests.faults import run_killed
from tests.s3 import Proxy
from tests.store.buckets import begin, empty_place, remove, there, write
from tests.store.caches import commit, content, make_cache

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def url(proxy: Proxy) -> str:
    return empty_place(proxy)


def test_another_plan(url: str, proxy: Proxy, tmp_path: Path) -> None:
    begin(url, tmp_path / "one", seed=1)
    with pytest.raises(
        PlanMismatchError, match=rf"^{url} was begun with other arguments; .*\n  seed: the cache has 1, this run 0$"
    ):
        begin(url, tmp_path / "two")
    write(f"{url}-finished", tmp_path / "three")
    before = there(proxy, f"{url}-finished")
    with pytest.raises(PlanMismatchError, match="was begun with other arguments"):
        begin(f"{url}-finished", tmp_path / "three", seed=1)
    assert there(proxy, f"{url}-finished") == before


def _push(root: Path, url: str) -> None:
    push(root, url)


def refused(act: str, url: str, proxy: Proxy, tmp_path: Path) -> tuple[Callable[[], Any], str]:
    """What makes no sense, and what is said."""
    staging = tmp_path / "staging"
    if act == "stranger":
        proxy.raw("PUT", f"/{url.removeprefix('s3://')}/letter.txt", b"dear")
        return lambda: begin(url, staging), rf"^{url} is not empty and not a logitcache cache \(it holds 'letter.txt'\)"
    if act == "caches below":
        write(f"{url}/deeper", tmp_path / "other")
        return lambda: begin(url, staging), r"is not empty and not a logitcache cache \(it holds 'deeper/README.md'\)"
    if act == "inside a cache":
        begin(url, staging)
        return lambda: begin(f"{url}/a/b", tmp_path / "other"), rf"^{url}/a/b lies inside the cache {url}; choose"
    if act == "push into a cache":
        begin(url, staging)
        root = make_cache(tmp_path / "cache").root
        return lambda: push(root, f"{url}/a"), rf"^{url}/a lies inside the cache {url}; choose another --out$"
    if act == "half a push":
        run_killed(FORK, _push, make_cache(tmp_path / "cache").root, url, failpoint="transfer.file_copied")
        return lambda: begin(url, staging), rf"^{url} holds an unfinished copy; run the `logitcache push` that began"
    if act == "push onto a dump":
        root = make_cache(tmp_path / "cache").root
        begin(url, staging)
        return lambda: push(root, url), rf"^{url} holds an unfinished dump; run the command that began it again, or"
    if act == "no bucket":
        return lambda: begin("s3://no-such-bucket/x", staging), "there is no bucket 'no-such-bucket' at http://127"
    if act == "forbidden":
        proxy.fail("PUT", status=403)
        return lambda: begin(url, staging), r"plan.json cannot be written: .* answers 403 AccessDenied; check the cred"
    if act == "a folder inside a cache":
        root = make_cache(tmp_path / "cache").root
        return lambda: begin(url, root / "staging"), "lies inside the cache"
    if act == "a folder that is a file":
        staging.write_text("dear")
        begun = begin(f"{url}", tmp_path / "other")
        assert begun.pending_units() == [0, 1, 2]
        return lambda: begin(url, staging), "staging.* cannot be written"
    if act == "damaged plan":
        proxy.raw("PUT", f"/{url.removeprefix('s3://')}/plan.json", b"{}")
        return lambda: begin(url, staging), rf"^{url}/plan.json is damaged"
    if act == "tables are gone":
        writer = begin(url, staging)
        for unit in writer.pending_units():
            commit(writer, unit, *content())
        remove(proxy, url, "codebook/tables.zarr.zip")
        return writer.finalize, "codebook/tables.zarr.zip is missing; restore it"
    if act == "units are missing":
        return begin(url, staging).finalize, rf"^{url} still lacks 3 units; run the same dump again$"
    assert act == "a record of another cache"
    write(f"{url}-other", tmp_path / "other", seed=1)
    writer = begin(url, staging)
    commit(writer, 0, *content())
    other = there(proxy, url)["commits/000000.json"]
    proxy.raw("PUT", f"/{url.removeprefix('s3://')}/commits/000001.json", other)
    return writer.commits, rf"^{url}/commits/000001.json belongs to another cache or unit; restore the right file$"


ACTS = ["stranger", "caches below", "inside a cache", "push into a cache",
        "half a push", "push onto a dump", "no bucket", "forbidden",
        "a folder inside a cache", "a folder that is a file", "damaged plan", "tables are gone", "units are missing",
        "a record of another cache"]  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
def test_refused(act: str, url: str, proxy: Proxy, tmp_path: Path) -> None:
    call, says = refused(act, url, proxy, tmp_path)
    before = there(proxy, url)
    with pytest.raises((CacheError, RemoteError, UsageError), match=says) as caught:
        call()
    assert "a-secret-access-key" not in str(caught.value)
    assert there(proxy, url) == before


def test_a_look_writes_nothing(url: str, proxy: Proxy, tmp_path: Path) -> None:
    begin(url, tmp_path / "one")
    proxy.log.clear()
    check_place(tmp_path / "two", url)
    assert proxy.count("^(PUT|POST|DELETE)") == 0
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("first", ["dump", "push"])
def test_a_push_and_a_dump_at_one_moment(first: str, url: str, proxy: Proxy, tmp_path: Path) -> None:
    """Both found an empty place. Whoever writes later sees the other; one of them goes on, or the user tries again."""
    root = make_cache(tmp_path / "cache", seed=1).root
    gate, said = threading.Event(), []
    held = proxy.fail("PUT .*/plan.json" if first == "push" else "PUT .*/transfer.json", until=gate)

    def late(act: Callable[[], Any]) -> None:
        try:
            act()
        except CacheError as error:
            said.append(str(error))

    acts: dict[str, Callable[[], Any]] = {
        "dump": lambda: begin(url, tmp_path / "staging"),
        "push": lambda: push(root, url),
    }
    slow = threading.Thread(target=late, args=(acts["push" if first == "dump" else "dump"],))
    slow.start()
    held.reached.wait()
    if first == "dump":
        acts["dump"]()
    else:
        run_killed(FORK, _push, root, url, failpoint="transfer.file_copied")
    gate.set()
    slow.join()
    if first == "dump":
        assert "holds an unfinished dump" in said[0]
        write(url, tmp_path / "staging")
    else:
        assert "holds an unfinished copy" in said[0]
        push(root, url)
    assert verify(url).ok
