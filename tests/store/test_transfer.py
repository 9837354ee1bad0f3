"""push and pull: whole or not at all, resumable at any moment, and never over another cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from logitcache.errors import CacheError, DamagedCacheError, RemoteError, UsageError
from logitcache.store import collect_garbage, objects_s3, open_cache, pull, push, verify
from logitcache.store.location import S3Location
from logitcache.store.objects import LocalObjects
from logitcache.store.objects_s3 import S3Objects
from tests.faults import flip_bit, run_killed
from tests.s3 import Proxy
from tests.store.caches import Made, files_of, make_cache

FORK = multiprocessing.get_context("fork")
BUCKETS = count()
SHARD = r"PUT .*/shards/"
FAILPOINTS = ["transfer.file_copied", "transfer.before_manifest", "transfer.manifest_written"]
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_cache(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture
def url(proxy: Proxy) -> str:
    """An empty place."""
    return f"{proxy.bucket(f'transfer{next(BUCKETS)}')}/caches/one"


def names(proxy: Proxy, url: str) -> list[str]:
    """Objects at a place."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    listed = proxy.raw("GET", f"/{bucket}?list-type=2&prefix={prefix}/").decode()
    return sorted(key.removeprefix(f"{prefix}/") for key in re.findall("<Key>(.*?)</Key>", listed))


def test_there_and_back(local: Made, url: str, proxy: Proxy, tmp_path: Path) -> None:
    done = push(local.root, url)
    cache = open_cache(local.root)
    files = files_of(local.root)
    assert names(proxy, url) == sorted([*files, "README.md"])
    assert (done.fingerprint, done.files, done.sent) == (cache.fingerprint, 4, 4)
    assert done.num_bytes == done.sent_bytes == cache.codebook_bytes + sum(s.num_bytes for s in cache.manifest.shards)
    back = pull(url, tmp_path / "back")
    assert files_of(tmp_path / "back") == files
    assert (back.sent, back.num_bytes) == (4, done.num_bytes)


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_folders(direction: str, local: Made, tmp_path: Path) -> None:
    """file:// and plain paths need no object store."""
    copy = push if direction == "push" else pull
    done = copy(str(local.root), f"file://{tmp_path}/deep/copy")
    assert done.sent == 4
    there = files_of(tmp_path / "deep" / "copy")
    assert there.pop("README.md", b"").startswith(b"---\n") == (direction == "push")
    assert there == files_of(local.root)
    assert copy(str(local.root), str(tmp_path / "deep" / "copy")).sent == 0


def test_again_sends_nothing_and_a_lost_object_only(local: Made, url: str, proxy: Proxy) -> None:
    push(local.root, url)
    proxy.raw("PUT", f"/{url.removeprefix('s3://')}/README.md", b"edited")
    proxy.log.clear()
    assert push(local.root, url).sent == 0
    assert proxy.count("^PUT") == 1  # the card, which is there
    assert proxy.raw("GET", f"/{url.removeprefix('s3://')}/README.md") == b"edited"
    shard = open_cache(local.root).manifest.shards[1]
    proxy.raw("DELETE", f"/{url.removeprefix('s3://')}/shards/{shard.file}")
    done = push(local.root, url)
    assert (done.sent, done.sent_bytes) == (1, shard.num_bytes)
    # One that came otherwise is not known to be right.
    proxy.raw("PUT", f"/{url.removeprefix('s3://')}/shards/{shard.file}", b"\0" * shard.num_bytes)
    assert push(local.root, url).sent == 1
    assert verify(url).ok


def _push(root: Path, url: str) -> None:
    push(root, url)


def _pull(url: str, root: Path) -> None:
    pull(url, root)


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_push_killed_anywhere_goes_on(failpoint: str, local: Made, url: str, proxy: Proxy) -> None:
    run_killed(FORK, _push, local.root, url, failpoint=failpoint)
    there = names(proxy, url)
    assert "transfer.json" in there
    if failpoint == "transfer.manifest_written":
        assert verify(url).ok
    else:
        with pytest.raises(CacheError, match="is unfinished; run the `logitcache push` that began it again"):
            open_cache(url)
    shards = [name for name in there if name.startswith("shards/")]
    proxy.log.clear()
    push(local.root, url)
    sent_again = [line.rpartition("/")[2] for line in proxy.log if line.startswith("PUT") and "/shards/" in line]
    assert len(sent_again) == 3 - len(shards)
    assert names(proxy, url) == sorted([*files_of(local.root), "README.md"])
    assert verify(url).ok


def test_a_push_killed_in_the_middle_of_an_object(local: Made, url: str, proxy: Proxy) -> None:
    never = threading.Event()
    fault = proxy.fail(SHARD, until=never)
    child = FORK.Process(target=_push, args=(local.root, url))
    child.start()
    fault.reached.wait()
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    never.set()
    push(local.root, url)
    assert verify(url).ok


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_pull_killed_anywhere_goes_on(failpoint: str, local: Made, url: str, proxy: Proxy, tmp_path: Path) -> None:
    push(local.root, url)
    run_killed(FORK, _pull, url, tmp_path / "back", failpoint=failpoint)
    if failpoint != "transfer.manifest_written":
        with pytest.raises(CacheError, match="is unfinished; run the command that began it again to finish it"):
            open_cache(tmp_path / "back")
    shards = list((tmp_path / "back" / "shards").glob("*.zip"))
    proxy.log.clear()
    pull(url, tmp_path / "back")
    assert proxy.count("GET .*/shards/") == 3 - len(shards)
    back = {name: data for name, data in files_of(tmp_path / "back").items() if not name.endswith(".tmp")}
    assert back == files_of(local.root)


def test_gc_leaves_a_running_pull_alone(local: Made, url: str, proxy: Proxy, tmp_path: Path) -> None:
    push(local.root, url)
    gate = threading.Event()
    fault = proxy.fail("GET .*/commits/", until=gate)
    puller = threading.Thread(target=_pull, args=(url, tmp_path / "back"))
    puller.start()
    fault.reached.wait()
    with pytest.raises(CacheError, match="is being written; wait until that run ends"):
        collect_garbage(tmp_path / "back", delete=True)
    gate.set()
    puller.join()
    assert verify(tmp_path / "back").ok


# ------------------------------------------------------------------------------------------ never over another cache


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_cache(tmp_path_factory.mktemp("cache") / "other", seed=1)


def test_another_cache_is_never_touched(local: Made, other: Made, url: str, proxy: Proxy, tmp_path: Path) -> None:
    here, there = open_cache(local.root).fingerprint, open_cache(other.root).fingerprint
    push(other.root, url)
    proxy.log.clear()
    says = f"holds the cache {there}, not {here}; remove that one, or choose another destination"
    with pytest.raises(CacheError, match=f"^{url} {says}$"):
        push(local.root, url)
    assert proxy.count("^(PUT|DELETE)") == 0
    shutil.copytree(local.root, tmp_path / "full")
    before = files_of(tmp_path / "full")
    with pytest.raises(CacheError, match=f"full holds the cache {here}, not {there}; remove"):
        pull(url, tmp_path / "full")
    assert files_of(tmp_path / "full") == before


def test_nor_a_half_copy_of_one(local: Made, other: Made, url: str, proxy: Proxy, tmp_path: Path) -> None:
    here, there = open_cache(local.root).fingerprint, open_cache(other.root).fingerprint
    run_killed(FORK, _push, other.root, url, failpoint="transfer.file_copied")
    with pytest.raises(CacheError, match=f"holds the unfinished copy {there}, not {here}; remove"):
        push(local.root, url)
    push(other.root, url)
    run_killed(FORK, _pull, url, tmp_path / "half", failpoint="transfer.file_copied")
    with pytest.raises(CacheError, match=f"half holds the unfinished copy {there}, not {here}; remove"):
        pull(str(local.root), tmp_path / "half")


def test_two_at_once(local: Made, other: Made, url: str, proxy: Proxy) -> None:
    """Only one of two different caches can begin: the marker is written where there is none."""
    gate = threading.Event()
    held = proxy.fail("PUT .*/transfer.json", until=gate)
    failed: list[BaseException] = []

    def late() -> None:
        try:
            push(other.root, url)
        except CacheError as error:
            failed.append(error)

    slow = threading.Thread(target=late)
    slow.start()
    held.reached.wait()
    run_killed(FORK, _push, local.root, url, failpoint="transfer.file_copied")
    gate.set()
    slow.join()
    assert f"holds the unfinished copy {open_cache(local.root).fingerprint}" in str(failed[0])
    push(local.root, url)
    assert verify(url).ok


def test_the_same_cache_twice_at_once(local: Made, url: str) -> None:
    children = [FORK.Process(target=_push, args=(local.root, url)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert verify(url).ok


def test_a_copy_that_another_run_begins(local: Made, tmp_path: Path) -> None:
    """Its marker's temporary file is no stranger's."""
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "transfer.json.k3f9x2ab.tmp").write_text("{")
    pull(str(local.root), tmp_path / "copy")
    assert verify(tmp_path / "copy").ok


def test_the_same_folder_pulled_several_times_at_once(local: Made, tmp_path: Path) -> None:
    for number in range(4):
        root = tmp_path / str(number)
        children = [FORK.Process(target=_pull, args=(str(local.root), root)) for _ in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 4
        assert files_of(root) == files_of(local.root)


def refused(act: str, local: Made, url: str, proxy: Proxy, tmp_path: Path) -> tuple[Callable[[], Any], str]:
    """A copy that makes no sense, and what is said."""
    strange, unfinished = tmp_path / "strange", tmp_path / "unfinished"
    strange.mkdir()
    (strange / "letter.txt").write_text("dear")
    if act == "strange folder":
        return lambda: pull(str(local.root), strange), "is not empty .it holds 'letter.txt'.; choose another"
    if act == "strange objects":
        proxy.raw("PUT", f"/{url.removeprefix('s3://')}/letter.txt", b"dear")
        return lambda: push(local.root, url), "is not empty .it holds 'letter.txt'.; choose another destination"
    if act == "a file":
        return lambda: pull(str(local.root), strange / "letter.txt"), "is a file; choose another folder"
    if act == "itself":
        return lambda: push(local.root, f"file://{local.root}"), "is the cache to copy; choose another"
    if act == "inside a cache":
        return lambda: push(local.root, str(local.root / "deeper")), "lies inside the cache"
    if act == "no cache":
        return lambda: push(strange, url), "strange is not a logitcache cache: it has no manifest.json and no plan"
    if act == "nothing there":
        return lambda: pull(url, tmp_path / "back"), f"{url} is not a logitcache cache: it has no manifest.json"
    if act == "pushed from afar":
        return lambda: push(url, "s3://bucket/b"), f"is remote, and this needs a folder; .* pull {url} FOLDER"
    if act == "pulled to afar":
        return lambda: pull(str(local.root), url), "is remote, and this needs a folder"
    make_cache(unfinished, units=range(2))
    return lambda: push(unfinished, url), "is unfinished; run the command that began it again"


ACTS = ["strange folder", "strange objects", "a file", "itself", "inside a cache", "no cache", "nothing there",
        "pushed from afar", "pulled to afar", "unfinished"]  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
def test_refused(act: str, local: Made, url: str, proxy: Proxy, tmp_path: Path) -> None:
    before = files_of(local.root)
    call, says = refused(act, local, url, proxy, tmp_path)
    with pytest.raises((CacheError, UsageError), match=says):
        call()
    assert files_of(local.root) == before
    assert "transfer.json" not in names(proxy, url)


# ---------------------------------------------------------------------------------------------- damage and bad days


def test_damage_is_not_pushed(local: Made, url: str, proxy: Proxy, tmp_path: Path) -> None:
    for part in ("shards", "codebook", "commits"):
        place = f"{url}/{part}"
        copy = local.copy(tmp_path / part)
        victim = sorted((copy.root / part).iterdir())[-1]
        flip_bit(victim, 4 * victim.stat().st_size)
        with pytest.raises(DamagedCacheError, match=f"{victim.name}.* is damaged"):
            push(copy.root, place)
        with pytest.raises(CacheError, match="is unfinished"):
            open_cache(place)
        push(local.root, place)
        assert verify(place).ok


FAULTS = [{"status": 500}, {"status": 503}, {"lose": True}, {"flip_sent": 100}]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_push_survives_what_passes(fault: dict[str, Any], local: Made, url: str, proxy: Proxy) -> None:
    """A lost answer, too, whose request the server has carried out."""
    proxy.fail(SHARD, **fault)
    if "flip_sent" not in fault:
        for match in ("PUT .*/transfer.json", "PUT .*/commits/", "PUT .*/manifest.json"):
            proxy.fail(match, **fault)
    push(local.root, url)
    assert all(fault.met for fault in proxy.faults)
    assert verify(url).ok


def test_another_writes_the_marker_at_this_moment(local: Made, url: str, proxy: Proxy) -> None:
    proxy.fail("PUT .*/transfer.json", status=409, times=2)
    push(local.root, url)
    assert verify(url).ok


def test_an_endpoint_without_conditional_writes(local: Made, url: str, proxy: Proxy) -> None:
    proxy.fail(r"PUT .* \*$", status=501, times=99)
    push(local.root, url)
    assert proxy.faults[0].met == 2
    assert verify(url).ok


def test_bytes_that_always_arrive_changed(local: Made, url: str, proxy: Proxy) -> None:
    proxy.fail("PUT .*/codebook/", times=99, flip_sent=5)
    with pytest.raises(RemoteError, match=r"tables.zarr.zip differs from what was sent, 3 times; check the network"):
        push(local.root, url)
    with pytest.raises(CacheError, match="is unfinished"):
        open_cache(url)


def test_no_right_to_write(local: Made, url: str, proxy: Proxy) -> None:
    proxy.fail("PUT", status=403)
    with pytest.raises(
        RemoteError, match=r"transfer.json cannot be written: .* answers 403 AccessDenied; check the cred"
    ):
        push(local.root, url)
    proxy.fail("DELETE", status=403)  # the marker stays, and harms nobody
    push(local.root, url)
    assert "transfer.json" in names(proxy, url)
    assert verify(url).ok
    assert push(local.root, url).sent == 0
    assert "transfer.json" not in names(proxy, url)


@pytest.mark.parametrize("fault", [{"status": 500}, {"after": 900}, {"short": 900}, {"flip": 900}], ids=str)
def test_a_pull_survives_what_passes(
    fault: dict[str, Any], local: Made, url: str, proxy: Proxy, tmp_path: Path
) -> None:
    push(local.root, url)
    proxy.fail("GET .*/shards/", **fault)
    pull(url, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(local.root)


# ------------------------------------------------------------------------------------------------------- large files


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts of the least size that S3 takes, 5 MiB."""
    monkeypatch.setattr(objects_s3, "PART_BYTES", 5 << 20)
    return 5 << 20


def large(folder: Path, num_bytes: int) -> tuple[LocalObjects, str]:
    import hashlib

    data = np.random.default_rng(0).bytes(num_bytes)
    folder.mkdir(exist_ok=True)
    (folder / "large").write_bytes(data)
    return LocalObjects(folder), hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("over", [0, 1, 5 << 20], ids=["one part", "a part and a byte", "two parts"])
def test_large_files_go_up_in_parts(over: int, parts: int, url: str, proxy: Proxy, tmp_path: Path) -> None:
    num_bytes = parts + over
    source, sha256 = large(tmp_path / "large", num_bytes)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    objects = S3Objects(S3Location(bucket, prefix))
    proxy.fail("PUT .*partNumber=1" if over else "PUT", flip_sent=5)
    objects.put_file("large", source, num_bytes, sha256)
    assert objects.has("large", num_bytes, sha256)
    assert b"".join(objects.stream("large")) == (tmp_path / "large" / "large").read_bytes()
    assert proxy.count("PUT .*partNumber=2") == (2 if over else 0)  # once more, because a byte was changed


def test_an_upload_that_fails_is_taken_back(parts: int, url: str, proxy: Proxy, tmp_path: Path) -> None:
    source, sha256 = large(tmp_path / "large", 2 * parts)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    objects = S3Objects(S3Location(bucket, prefix))
    with pytest.raises(DamagedCacheError, match=r"large is damaged: its size or SHA-256 differs; restore it"):
        objects.put_file("large", source, 2 * parts, "0" * 64)
    assert proxy.count("DELETE .*uploadId") == 1
    assert objects.size("large") is None
    assert sha256


# ----------------------------------------------------------------------------------------------------------- the card


def test_the_card(local: Made, url: str, proxy: Proxy) -> None:
    push(local.root, url)
    card = proxy.raw("GET", f"/{url.removeprefix('s3://')}/README.md").decode()
    _, front, text = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["pretty_name"] == "none, sample:9"
    assert "logitcache" in facts["tags"]
    assert facts["size_categories"] == ["n<1K"]
    cache = open_cache(local.root)
    num_bytes = cache.codebook_bytes + sum(shard.num_bytes for shard in cache.manifest.shards)
    for fact in (
        "| selection | `sample:9`, unbiased |",
        "| tokens | 103 in 21 blocks of 5 |",
        f"| size | {num_bytes:,} bytes, {num_bytes / 103:.1f} bytes a token, 3 shards |",
        f"| fingerprint | `{cache.fingerprint}` |",
        f"logitcache.open_cache({url!r})",
        f"logitcache train --cache {url} ",
    ):
        assert fact in text
    assert json.dumps(facts)


def test_progress(local: Made, url: str) -> None:
    seen: list[tuple[int, int]] = []
    done = push(local.root, url, lambda moved, total: seen.append((moved, total)))
    assert {total for _, total in seen} == {done.num_bytes}
    moved = [moved for moved, _ in seen]
    assert moved == sorted(moved)
    assert moved[-1] == done.num_bytes
