"""Reading a cache in a bucket of a real S3 server, through a proxy that fails in every way of fault 23 and 24."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from logitcache.errors import CacheError, DamagedCacheError, RemoteError
from logitcache.store import Cache, objects_s3, open_cache, s3_client, verify
from logitcache.store.files import checked_json
from logitcache.store.remote import RemoteFiles
from tests.s3 import Proxy, make_bucket
from tests.store.caches import Made, files_of, make_cache

FORK = multiprocessing.get_context("fork")
BUCKETS = count()
SHARD = r"GET .*/shards/"
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_cache(tmp_path_factory.mktemp("cache") / "cache")


def place(port: int, local: Made) -> str:
    """A bucket with the cache of three shards in it."""
    files = {f"caches/one/{name}": data for name, data in files_of(local.root).items()}
    return make_bucket(port, f"remote{next(BUCKETS)}", files) + "/caches/one"


@pytest.fixture(scope="module")
def shared_url(local: Made, s3_port: int) -> str:
    return place(s3_port, local)


@pytest.fixture
def url(shared_url: str, proxy: Proxy) -> str:
    """The cache in a bucket, for tests that change no object."""
    return shared_url


@pytest.fixture
def own_url(local: Made, s3_port: int, proxy: Proxy) -> str:
    """For those that do."""
    return place(s3_port, local)


@pytest.fixture
def folder() -> Path:
    """Where copies are kept."""
    return Path(os.environ["LOGITCACHE_LOCAL_DIR"])


def check(local: Made, url: str, **options: Any) -> Cache:
    """Every row is that of the local cache."""
    cache = open_cache(url, **options)
    local.check(cache.read_blocks(0, 21), 0, 21)
    return cache


def copies(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")


# ------------------------------------------------------------------------------------------------- as it should be


@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_it_is_the_local_cache(container: Any, proxy: Proxy, tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", "logprob", container=container)
    url = place(proxy.server_port, made)
    cache, near = check(made, url), open_cache(made.root)
    assert cache.manifest == near.manifest
    assert (cache.fingerprint, cache.num_bytes, cache.codebook_bytes, cache.stored_bytes()) == (
        near.fingerprint,
        near.num_bytes,
        near.codebook_bytes,
        near.stored_bytes(),
    )
    assert cache.location == url
    assert repr(cache) == f"Cache({url!r}, 103 tokens in 21 blocks)"
    assert proxy.count(SHARD) == 3
    check(made, url)
    assert proxy.count(SHARD) == 3


def test_shards_are_fetched_when_they_are_read(url: str, proxy: Proxy, local: Made) -> None:
    cache = open_cache(url)
    assert proxy.log == [line for line in proxy.log if line.endswith("/manifest.json")]
    local.check(cache.read_blocks(9, 12), 9, 12)
    assert proxy.count(SHARD) == 1


def test_verify_fetches_everything_anew(url: str, proxy: Proxy, local: Made, folder: Path) -> None:
    check(local, url)
    before = copies(folder)
    report = verify(url)
    assert report == verify(local.root)
    assert report.ok
    assert proxy.count(SHARD) == 6
    assert copies(folder) == before


def test_verify_sweeps_what_killed_ones_left(url: str, folder: Path) -> None:
    for name in ("verify.dead", "verify.live"):
        (folder / name / "cache").mkdir(parents=True)
        (folder / name / "cache" / "000000.zarr.zip").write_bytes(b"?")
    handle = os.open(folder / "verify.live", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    assert verify(url).ok
    assert [path.name for path in folder.glob("verify.*")] == ["verify.live"]
    os.close(handle)


def test_a_pickled_and_a_forked_cache_read(url: str, proxy: Proxy, local: Made) -> None:
    """A loader's worker goes on with a connection of its own."""
    cache = open_cache(url)
    local.check(cache.read_blocks(0, 2), 0, 2)
    local.check(pickle.loads(pickle.dumps(cache)).read_blocks(8, 10), 8, 10)
    children = [FORK.Process(target=_read_all, args=(cache, local)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert proxy.count(SHARD) == 3


def _read_all(cache: Cache, local: Made) -> None:
    local.check(cache.read_blocks(0, 21), 0, 21)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_fetch_each_shard_once(processes: int, url: str, proxy: Proxy, local: Made) -> None:
    """They open the same cold cache at once; the first answer comes when all have begun."""
    gate = threading.Event()
    held = proxy.fail(SHARD, until=gate)
    children = [FORK.Process(target=_open_and_read, args=(url, local)) for _ in range(processes)]
    for child in children:
        child.start()
    held.reached.wait()
    while proxy.count("GET .*/manifest.json") < processes:
        held.reached.wait(0.01)
    gate.set()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * processes
    assert proxy.count(SHARD) == 3
    assert proxy.count("GET .*/codebook/") == 1


def _open_and_read(url: str, local: Made) -> None:
    check(local, url)


def test_equal_caches_at_two_places_share_copies(url: str, proxy: Proxy, local: Made) -> None:
    check(local, url)
    proxy.log.clear()
    check(local, place(proxy.server_port, local))
    assert proxy.count(SHARD) == 0


def test_prefetch(url: str, proxy: Proxy, local: Made, folder: Path) -> None:
    cache = open_cache(url)
    cache.prefetch([2, 1])
    for thread in [thread for thread in threading.enumerate() if thread.name == "logitcache-prefetch"]:
        thread.join()
    assert {path.name for path in copies(folder)} == {shard.file for shard in cache.manifest.shards[1:]}
    local.check(cache.read_blocks(8, 21), 8, 21)
    assert proxy.count(SHARD) == 2
    # A hint: neither a missing object nor a folder that is too small is an error.
    proxy.fail(SHARD, times=99, status=403)
    cache.prefetch([0])
    open_cache(url, local_dir=folder / "small", local_bytes=10).prefetch([0, 1, 2])
    open_cache(local.root).prefetch([0])


# ---------------------------------------------------------------------------------------- fault 24: the local folder


def test_a_bound_of_one_shard(url: str, proxy: Proxy, local: Made, folder: Path) -> None:
    """What is open is over the bound; what nobody has open is not kept."""
    cache = open_cache(url)
    largest = cache.codebook_bytes + max(shard.num_bytes for shard in cache.manifest.shards)
    cache = check(local, url, local_bytes=largest)
    del cache
    check(local, url, local_bytes=largest)
    for block in (0, 9, 17, 1, 10, 18):
        cache = open_cache(url, local_bytes=largest)
        local.check(cache.read_blocks(block, block + 1), block, block + 1)
        cache.close()
        assert sum(path.stat().st_size for path in copies(folder)) <= largest
    assert proxy.count(SHARD) > 6


def test_copies_that_vanish_while_they_are_read(url: str, proxy: Proxy, local: Made, folder: Path) -> None:
    cache = check(local, url)
    shutil.rmtree(folder)
    cache._decoded.clear()
    local.check(cache.read_blocks(0, 21), 0, 21)  # open files stay readable
    cache.close()
    local.check(cache.read_blocks(0, 21), 0, 21)
    assert proxy.count(SHARD) == 6


def test_a_damaged_copy_is_fetched_again(url: str, proxy: Proxy, local: Made, folder: Path) -> None:
    check(local, url)
    for path in copies(folder):
        path.write_bytes(b"\0" * path.stat().st_size)
    check(local, url)
    assert proxy.count(SHARD) == 6
    for path in copies(folder):
        path.write_bytes(path.read_bytes()[:-1])
    check(local, url)
    assert proxy.count(SHARD) == 9


def test_a_folder_that_can_only_be_read(url: str, proxy: Proxy, local: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is used, what is not goes to a folder of this user's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as shared:
        monkeypatch.setenv("LOGITCACHE_LOCAL_DIR", f"{shared}/local")
        cache = open_cache(url)
        cache.read_blocks(0, 2)
        for path in [Path(shared), *Path(shared).rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        (Path(shared) / "spare").mkdir() if os.geteuid() == 0 else None
        proxy.log.clear()
        child = FORK.Process(target=_read_as_nobody, args=(url, local, shared))
        child.start()
        child.join()
        for path in [Path(shared), *Path(shared).rglob("*")]:
            path.chmod(0o755)
        assert child.exitcode == 0
        assert proxy.count(SHARD) == 2


def _read_as_nobody(url: str, local: Made, shared: str) -> None:
    spare = tempfile.mkdtemp()
    if os.geteuid() == 0:  # whom no permission stops
        os.chown(spare, 65534, 65534)
        os.setuid(65534)
    tempfile.tempdir = spare
    with pytest.warns(UserWarning, match=f"{shared}/local cannot be written; what is not there is kept in {spare}"):
        check(local, url)
    check(local, url)
    assert len(copies(Path(spare))) == 2
    shutil.rmtree(spare)


def test_a_killed_download(url: str, proxy: Proxy, local: Made, folder: Path) -> None:
    """It blocks nobody, and the half file is not used."""
    never = threading.Event()
    broken = proxy.fail(SHARD, after=1000, until=never)
    child = FORK.Process(target=_open_and_read, args=(url, local))
    child.start()
    broken.reached.wait()
    assert [path.suffix for path in copies(folder)] == [".part"]
    reader = threading.Thread(target=_open_and_read, args=(url, local))
    reader.start()
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    reader.join()
    never.set()
    check(local, url)
    assert proxy.count(SHARD) == 4
    assert not [path for path in copies(folder) if path.suffix == ".part"]


# -------------------------------------------------------------------------------------- fault 23: the object store


@pytest.mark.parametrize(
    "fault",
    [{"status": 500}, {"status": 503}, {"after": 2000}, {"after": 0}, {"lose": True}, {"short": 2000}, {"flip": 1000}],
    ids=str,
)
def test_what_passes_is_survived(fault: dict[str, Any], url: str, proxy: Proxy, local: Made) -> None:
    """Of the manifest, the tables and a shard alike."""
    for match in ("GET .*manifest.json", "GET .*codebook", SHARD):
        proxy.fail(match, **fault)
    check(local, url)
    assert all(fault.met == 1 for fault in proxy.faults)


def test_a_download_goes_on_where_it_broke(
    url: str, proxy: Proxy, local: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects_s3, "PIECE_BYTES", 512)
    proxy.fail(SHARD, after=2100)
    proxy.fail(SHARD, after=1024)
    local.check(open_cache(url).read_blocks(0, 2), 0, 2)
    asked = [line.partition(".zarr.zip ")[2] for line in proxy.log if "/shards/" in line]
    assert asked == ["", "bytes=2100-", "bytes=3124-"]


def test_a_stalled_connection(url: str, proxy: Proxy, local: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer, then half an answer and nothing more."""
    monkeypatch.setattr(s3_client, "READ_SECONDS", 0.3)
    never = threading.Event()
    proxy.fail(SHARD, until=never)
    proxy.fail(SHARD, after=1000, until=never)
    check(local, url)
    never.set()
    assert proxy.count(SHARD) == 5


def test_an_object_replaced_while_it_is_read(
    own_url: str, proxy: Proxy, local: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came before is of another object, and is thrown away."""
    monkeypatch.setattr(objects_s3, "PIECE_BYTES", 512)
    shard = open_cache(own_url).manifest.shards[0]
    path = f"/{own_url.removeprefix('s3://')}/shards/{shard.file}"
    right = (local.root / "shards" / shard.file).read_bytes()
    proxy.raw("PUT", path, bytes(byte ^ 1 for byte in right))
    gate = threading.Event()
    broken = proxy.fail(SHARD, after=2000, until=gate)
    read: list[Any] = []
    reader = threading.Thread(target=lambda: read.append(open_cache(own_url).read_blocks(0, 2)))
    reader.start()
    broken.reached.wait()
    proxy.raw("PUT", path, right)
    gate.set()
    reader.join()
    local.check(read[0], 0, 2)


def wrong_for_ever(act: str, proxy: Proxy, url: str) -> str:
    """Damage that stays; what the message says of it."""
    shard = open_cache(url).manifest.shards[0]
    path = f"/{url.removeprefix('s3://')}/shards/{shard.file}"
    right = proxy.raw("GET", path)
    if act == "missing":
        proxy.raw("DELETE", path)
        return "is missing; restore it, or push the cache again"
    changed = {
        "flipped": bytes([right[0] ^ 1]) + right[1:],
        "shorter": right[:-1],
        "longer": right + b"x",
    }[act]
    proxy.raw("PUT", path, changed)
    says = {
        "flipped": "differs from its SHA-256 in the manifest",
        "shorter": f"has {len(right) - 1} bytes, not {len(right)}",
        "longer": f"has more than the {len(right)} bytes that the manifest gives it",
    }
    return says[act] + ": it was damaged or replaced there; restore it, or push the cache again"


@pytest.mark.parametrize("act", ["missing", "flipped", "shorter", "longer"])
def test_damage_in_the_bucket_names_the_object(act: str, own_url: str, proxy: Proxy, folder: Path) -> None:
    says = wrong_for_ever(act, proxy, own_url)
    cache = open_cache(own_url)
    shard = cache.manifest.shards[0].file
    with pytest.raises(DamagedCacheError, match=f"^{own_url}/shards/{shard} {says}$") as caught:
        cache.read_blocks(0, 2)
    assert caught.value.shard == shard
    assert copies(folder) == []
    (problem,) = verify(own_url).problems
    assert (problem.shard, problem.what) == (shard, f"{own_url}/shards/{shard} {says}")


@pytest.mark.parametrize("name", ["plan.json", "commits/000001.json", "codebook/tables.zarr.zip"])
def test_verify_names_other_objects(name: str, own_url: str, proxy: Proxy) -> None:
    path = f"/{own_url.removeprefix('s3://')}/{name}"
    data = proxy.raw("GET", path)
    proxy.raw("PUT", path, bytes([data[0] ^ 1]) + data[1:])
    for _ in range(2):
        (problem,) = verify(own_url).problems
        assert f"{own_url}/{name}" in problem.what
        proxy.raw("DELETE", path)


def test_a_manifest_that_lies(own_url: str, proxy: Proxy) -> None:
    path = f"/{own_url.removeprefix('s3://')}/manifest.json"
    fields = json.loads(proxy.raw("GET", path))
    proxy.raw("PUT", path, b"{")
    with pytest.raises(DamagedCacheError, match=f"^{own_url}/manifest.json is damaged: it is not a checksummed JSON"):
        open_cache(own_url)
    del fields["checksum"]
    proxy.raw("PUT", path, checked_json({**fields, "fingerprint": "0" * 64}))
    with pytest.raises(DamagedCacheError, match=f"^{own_url}/manifest.json contradicts itself"):
        open_cache(own_url)


def test_where_no_cache_is(own_url: str, proxy: Proxy) -> None:
    with pytest.raises(
        CacheError, match=f"^{own_url}/deeper is not a logitcache cache: it has no manifest.json; check"
    ):
        open_cache(f"{own_url}/deeper")
    proxy.raw("DELETE", f"/{own_url.removeprefix('s3://')}/manifest.json")
    with pytest.raises(CacheError, match=f"^{own_url} is unfinished; run the `logitcache dump` that began it again$"):
        open_cache(own_url, partial=True)


# ---------------------------------------------------------------------------------------- what cannot be reached


def refusals(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Ways in which an endpoint cannot be used, and what is said."""
    yield "s3://no-such-bucket/a", f"there is no bucket 'no-such-bucket' at {proxy.url}; check its name"
    proxy.fail("GET", status=403)
    yield "s3://bucket/a", f"{proxy.url} answers 403 AccessDenied; check the credentials"
    proxy.fail("GET", status=503, times=2)
    yield "s3://bucket/a", f"{proxy.url} answers 503 SlowDown again and again; try the same later"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:password@127.0.0.1:9")
    yield "s3://bucket/a", r"http://127.0.0.1:9 cannot be reached or breaks off \(EndpointConnectionError\)"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    yield "s3://bucket/a", "AWS_ENDPOINT_URL is no URL"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://169.254.169.254")
    yield "s3://bucket/a", "names the link-local address 169.254.169.254"
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    yield "s3://bucket/a", r"S3 cannot be used: The config profile \(nobody\) could not be found"
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    yield "s3://bucket/a", "missing: AWS_SECRET_ACCESS_KEY; mend"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    yield "s3://bucket/a", "no S3 credentials are found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "1")
    proxy.bucket("private")
    proxy.raw("PUT", "/private/a/manifest.json", b"secret")
    yield "s3://private/a", f"{proxy.url} answers 403; check the credentials"


def test_every_refusal_is_one_sentence_without_keys(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, says in refusals(proxy, monkeypatch):
        with pytest.raises(RemoteError, match=says) as caught:
            open_cache(url)
        assert not any(key in str(caught.value) for key in ("an-access-key", "a-secret", "password", "\n"))


def test_without_botocore(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "botocore.session", None)
    with pytest.raises(RemoteError, match=r"^s3:// needs botocore; install it: pip install 'logitcache\[s3\]'$"):
        open_cache("s3://bucket/a")


def test_sizes_without_the_right_to_list(url: str, proxy: Proxy, local: Made) -> None:
    proxy.fail(r"GET .*list-type", status=403)
    near = open_cache(local.root)
    commits = sum(path.stat().st_size for path in (local.root / "commits").iterdir())
    assert open_cache(url).num_bytes == near.num_bytes - commits


def test_open_shards_are_bounded(url: str, monkeypatch: pytest.MonkeyPatch, local: Made) -> None:
    monkeypatch.setattr(RemoteFiles, "open_shards", 1)
    cache = check(local, url)
    assert len(cache._shards) == 1
