"""Writing a cache into a bucket: whole or not at all, from any machine, and never over something else."""

from __future__ import annotations

import multiprocessing
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.errors import CacheError, RemoteError
from logitcache.store import (
    ContainerKind,
    open_cache,
    push,
    staging_folder,
    verify,
)
from logitcache.store.location import S3Location
from tests.faults import run_killed
from tests.s3 import Proxy
from tests.store.buckets import begin, empty_place, remove, there, write, written
from tests.store.caches import CONTAINERS, commit, content, files_of, make_cache

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def url(proxy: Proxy) -> str:
    return empty_place(proxy)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the same cache in a folder."""
    return files_of(make_cache(tmp_path_factory.mktemp("cache") / "cache").root)


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_bytes_of_a_cache_in_a_folder(container: ContainerKind, url: str, proxy: Proxy, tmp_path: Path) -> None:
    write(url, tmp_path / "staging", container)
    assert written(proxy, url) == files_of(make_cache(tmp_path / "cache", container=container).root)
    assert not (tmp_path / "staging").exists()
    assert verify(url).ok
    # A copy of it is the same for `push`, too.
    assert push(tmp_path / "cache", url).sent == 0
    proxy.log.clear()
    write(url, tmp_path / "staging", container)
    assert proxy.count("^(PUT|POST|DELETE)") == 0
    assert not (tmp_path / "staging").exists()


def test_the_staging_folder_stays_small(url: str, tmp_path: Path) -> None:
    writer = begin(url, tmp_path / "staging")
    for unit in writer.pending_units():
        commit(writer, unit, *content())
    kept = {name.partition("/")[0] for name in files_of(tmp_path / "staging")}
    assert kept == {"plan.json", "codebook"}


FAILPOINTS = {
    "plan.written": 0,
    "codebook.written": 0,
    "commit.before_write": 0,
    "commit.after_write": 0,
    "bucket.before_upload": 0,
    "bucket.shard_sent": 0,
    "bucket.committed": 1,
    "bucket.before_manifest": 3,
    "bucket.manifest_written": 3,
}


def test_every_failpoint_is_tried() -> None:
    from logitcache.store import bucket_writer

    names = set(re.findall(r'failpoint\("([a-z._]+)"\)', Path(bucket_writer.__file__).read_text()))
    assert names < FAILPOINTS.keys()


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_kill_at_a_failpoint(failpoint: str, whole: dict[str, bytes], url: str, proxy: Proxy, tmp_path: Path) -> None:
    """Nothing that is half there counts, and another machine, which has nothing of the first, goes on."""
    run_killed(FORK, write, url, tmp_path / "one", failpoint=failpoint)
    found = there(proxy, url)
    assert sum(name.startswith("commits/") for name in found) == FAILPOINTS[failpoint]
    if "manifest.json" not in found:
        with pytest.raises(CacheError, match=r"is unfinished; run the `logitcache dump` that began it again$"):
            open_cache(url)
    proxy.log.clear()
    write(url, tmp_path / "two")
    assert proxy.count("PUT .*/commits/") == 3 - FAILPOINTS[failpoint]
    assert written(proxy, url) == whole
    assert verify(url).ok
    # Nor does what was left on the first machine stand in anybody's way.
    write(url, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_two_machines_with_other_content(url: str, proxy: Proxy, tmp_path: Path) -> None:
    """As of other hardware: the bucket's tables are everybody's, the first commit of a unit counts."""
    one, two = (begin(url, tmp_path / name) for name in ("one", "two"))
    rows, others = content(), content(seed=1)
    assert commit(one, 0, *rows)
    assert commit(two, 1, *others)
    gate = threading.Event()
    fault = proxy.fail("PUT .*/commits/000002", until=gate)
    sizes: list[int] = []
    slow = threading.Thread(target=lambda: sizes.append(commit(one, 2, *rows)))
    slow.start()
    fault.reached.wait()
    assert commit(two, 2, *others)
    gate.set()
    slow.join()
    assert sizes == [0]
    assert sum(name.startswith("shards/000002") for name in there(proxy, url)) == 2
    assert one.finalize().fingerprint == two.finalize().fingerprint == open_cache(url).fingerprint
    assert verify(url).ok
    # Whoever finishes removes the loser's shard.
    assert sum(name.startswith("shards/000002") for name in there(proxy, url)) == 1
    tokens = np.concatenate([rows[0][:40], others[0][40:]])
    blocks = open_cache(url).read_blocks(0, 21)
    np.testing.assert_array_equal(blocks.tokens[blocks.valid], tokens)


def test_two_make_the_tables(url: str, proxy: Proxy, tmp_path: Path) -> None:
    one, two = (begin(url, tmp_path / name) for name in ("one", "two"))
    tokens, targets = content()
    other_tokens, other_targets = content(seed=1)
    assert two.codebook() is None
    made = one.publish_pilot(tokens, targets)
    taken = two.publish_pilot(other_tokens, other_targets)
    np.testing.assert_array_equal(taken.ranks.encode(tokens), made.ranks.encode(tokens))
    assert (tmp_path / "one/codebook/tables.zarr.zip").read_bytes() == (
        tmp_path / "two/codebook/tables.zarr.zip"
    ).read_bytes()


def test_a_folder_older_than_the_bucket(url: str, proxy: Proxy, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Somebody emptied the bucket and began another cache: nothing of the folder counts."""
    writer = begin(url, tmp_path / "staging", seed=1)
    commit(writer, 0, *content(seed=1))
    del writer
    for name in there(proxy, url):
        remove(proxy, url, name)
    write(url, tmp_path / "staging")
    assert written(proxy, url) == whole


def test_tables_that_were_copied_by_other_means(
    url: str, proxy: Proxy, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """Without the hash that this program stores beside them."""
    run_killed(FORK, write, url, tmp_path / "one", failpoint="bucket.committed")
    path = f"/{url.removeprefix('s3://')}/codebook/tables.zarr.zip"
    proxy.raw("PUT", path, proxy.raw("GET", path))
    proxy.fail("GET .*/codebook/", flip=40)
    write(url, tmp_path / "two")
    assert written(proxy, url) == whole


@pytest.mark.parametrize("finished", [False, True])
def test_a_shard_that_is_gone_is_written_again(
    finished: bool, url: str, proxy: Proxy, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    if finished:
        write(url, tmp_path / "one")
    else:
        run_killed(FORK, write, url, tmp_path / "one", failpoint="bucket.before_manifest")
    shard = min(name for name in there(proxy, url) if name.startswith("shards/"))
    remove(proxy, url, shard)
    if finished:
        proxy.fail("DELETE .*/manifest.json", status=403)
        with pytest.raises(RemoteError, match=r"manifest.json cannot be removed, .*; allow s3:DeleteObject, or"):
            write(url, tmp_path / "two")
    write(url, tmp_path / "two")
    assert written(proxy, url) == whole


def test_a_shard_that_is_gone_and_an_orphan_of_its_unit(
    url: str, proxy: Proxy, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """Only the records tell; they are compared in the end."""
    run_killed(FORK, write, url, tmp_path / "one", failpoint="bucket.before_manifest")
    shard = min(name for name in there(proxy, url) if name.startswith("shards/"))
    remove(proxy, url, shard)
    proxy.raw("PUT", f"/{url.removeprefix('s3://')}/shards/000000-{'0' * 12}.zarr.zip", b"another")
    with pytest.raises(CacheError, match=rf"^{url} lost the shards of 1 units; run the same dump again$"):
        write(url, tmp_path / "two")
    write(url, tmp_path / "two")
    assert written(proxy, url) == whole


def test_a_unit_that_is_committed_at_this_moment_is_not_missing(url: str, proxy: Proxy, tmp_path: Path) -> None:
    """What others commit between two lists of what is there has its shard."""
    one, two = (begin(url, tmp_path / name) for name in ("one", "two"))
    commit(one, 0, *content())
    gate, found = threading.Event(), []
    fault = proxy.fail("GET .*list-type.*commits", until=gate)
    looker = threading.Thread(target=lambda: found.append(two.lost_units()))
    looker.start()
    fault.reached.wait()
    commit(one, 1, *content())
    gate.set()
    looker.join()
    assert found == [[]]


# ------------------------------------------------------------------------------------------------------- bad days

FAULTS = [{"status": 500}, {"status": 503}, {"lose": True}, {"flip_sent": 40}]
WRITTEN = ("plan.json", "codebook/", "shards/", "commits/", "README.md", "manifest.json")


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_what_passes_is_survived(
    fault: dict[str, Any], url: str, proxy: Proxy, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """An answer that is lost, too, whose request the server has carried out; and bytes changed on their way."""
    for name in WRITTEN:
        proxy.fail(f"PUT .*/{name}", **fault)
    if "flip_sent" not in fault:
        for match in ("GET .*list-type", "HEAD", "GET .*/plan.json", "GET .*/commits/"):
            proxy.fail(match, **fault)
    write(url, tmp_path / "staging")
    assert all(fault.met for fault in proxy.faults)
    assert written(proxy, url) == whole


def test_others_write_at_this_moment(url: str, proxy: Proxy, tmp_path: Path, whole: dict[str, bytes]) -> None:
    for name in ("plan.json", "codebook/", "commits/", "manifest.json"):
        proxy.fail(f"PUT .*/{name}", status=409, times=2)
    write(url, tmp_path / "staging")
    assert all(fault.met == 2 for fault in proxy.faults)
    assert written(proxy, url) == whole


def test_an_endpoint_without_conditional_writes(
    url: str, proxy: Proxy, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    proxy.fail(r"PUT .* \*$", status=501, times=99)
    write(url, tmp_path / "staging")
    assert written(proxy, url) == whole


@pytest.mark.parametrize("name", ["shards/000001", "commits/000001", "manifest.json"])
def test_an_outage_ends_the_run_which_goes_on_later(
    name: str, url: str, proxy: Proxy, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    outage = proxy.fail(f"PUT .*/{name}", status=500, times=99)
    with pytest.raises(RemoteError, match=rf"{name}.* cannot be written: .* answers 500 .*again and again; try"):
        write(url, tmp_path / "staging")
    assert not list((tmp_path / "staging").rglob("*.tmp"))
    outage.times = 0
    proxy.log.clear()
    write(url, tmp_path / "staging")
    assert proxy.count("PUT .*/commits/") == (0 if name == "manifest.json" else 2)
    assert written(proxy, url) == whole


def test_no_right_to_remove(url: str, proxy: Proxy, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Nothing that counts is ever removed or replaced."""
    orphan = f"shards/000000-{'0' * 12}.zarr.zip"
    begin(url, tmp_path / "staging")
    proxy.raw("PUT", f"/{url.removeprefix('s3://')}/{orphan}", b"another")
    proxy.fail("DELETE", status=403, times=99)
    write(url, tmp_path / "staging")
    assert proxy.faults[0].met == 1
    found = written(proxy, url)
    assert found.pop(orphan) == b"another"
    assert found == whole
    assert verify(url).ok


def test_a_full_disk(url: str, proxy: Proxy, tmp_path: Path, whole: dict[str, bytes], monkeypatch: Any) -> None:
    """Only what a unit takes is needed here, and what is in the bucket stays there."""

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device", str(tmp_path / "staging" / "shards" / "x.tmp"))

    writer = begin(url, tmp_path / "staging")
    commit(writer, 0, *content())
    with monkeypatch.context() as patch:
        patch.setattr("logitcache.store.writer.write_container", full)
        with pytest.raises(CacheError, match=r"^no space to write .*staging.*about .* bytes are needed, .* it resumes"):
            commit(writer, 1, *content())
    write(url, tmp_path / "staging")
    assert written(proxy, url) == whole


def test_where_the_work_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder for each place, the same for all workers of a machine."""
    monkeypatch.setenv("LOGITCACHE_HOME", str(tmp_path / "home"))
    place = S3Location("bucket", "caches/one")
    folder = staging_folder(place)
    assert folder.parent == tmp_path / "home" / "staging"
    assert folder == staging_folder(S3Location("bucket", "caches/one"))
    assert folder != staging_folder(S3Location("bucket", "caches/two"))
    assert staging_folder(place, tmp_path / "mine") == tmp_path / "mine" / folder.name
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://elsewhere")
    assert folder != staging_folder(place)
