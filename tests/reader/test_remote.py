"""Reading through a folder of copies that is too small or vanishes, a failing store, a read-only cache (fault 24)."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from logitcache.errors import RemoteError
from logitcache.store import Cache, Geometry, open_cache
from tests.caches import random_cache
from tests.reader.batches import MANY_WORKERS, reader, tokens_of
from tests.s3 import Proxy, make_bucket
from tests.store.caches import files_of

FORK = multiprocessing.get_context("fork")
SHARD = r"GET .*/shards/"
# Thirty shards, of which eight are open at most.
SHARDS_OF_TWO = Geometry(num_tokens=237, block_length=4, chunk_blocks=1, unit_blocks=2)
BATCHES = 30
NOBODY = 65534
pytestmark = [MANY_WORKERS, pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return random_cache(tmp_path_factory.mktemp("remote") / "cache", geometry=SHARDS_OF_TWO)


@pytest.fixture(scope="module")
def whole(cache: Cache) -> list[Any]:
    """Two epochs."""
    return tokens_of(reader(cache, BATCHES))


@pytest.fixture(scope="module")
def stored(cache: Cache, s3_port: int) -> str:
    return make_bucket(s3_port, "read", {f"one/{name}": data for name, data in files_of(cache.root).items()}) + "/one"


@pytest.fixture
def url(stored: str, proxy: Proxy) -> str:
    return stored


def small(cache: Cache) -> int:
    """Bytes of a folder that holds the tables and two of the thirty shards."""
    return cache.codebook_bytes + 2 * max(shard.num_bytes for shard in cache.manifest.shards)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_two_shards(url: str, proxy: Proxy, cache: Cache, whole: list[Any], workers: int) -> None:
    """Shards are evicted and fetched again under the threads that read ahead."""
    dataset = reader(open_cache(url, local_bytes=small(cache)), BATCHES)
    assert tokens_of(DataLoader(dataset, batch_size=None, num_workers=workers)) == whole
    assert proxy.count(SHARD) > 40


def _read(url: str, num_bytes: int, told: Connection) -> None:
    told.send(tokens_of(reader(open_cache(url, local_bytes=num_bytes), BATCHES)))


def test_several_processes_in_it(url: str, cache: Cache, whole: list[Any]) -> None:
    """Each evicts what the others read or are about to."""
    pipes = [FORK.Pipe() for _ in range(3)]
    children = [FORK.Process(target=_read, args=(url, small(cache), there)) for _, there in pipes]
    for child, (_, there) in zip(children, pipes, strict=True):
        child.start()
        there.close()
    assert [here.recv() for here, _ in pipes] == [whole] * 3
    for child in children:
        child.join()
        assert child.exitcode == 0


def test_a_folder_that_vanishes(url: str, whole: list[Any]) -> None:
    """After every second batch."""
    stream = iter(reader(open_cache(url), BATCHES))
    read = []
    for _ in range(BATCHES // 2):
        read += tokens_of(islice(stream, 2))
        shutil.rmtree(os.environ["LOGITCACHE_LOCAL_DIR"], ignore_errors=True)
    assert read == whole


def test_a_store_that_fails(url: str, proxy: Proxy, whole: list[Any]) -> None:
    """An error in the consumer after the batches before it; the state goes on when the store is there again."""
    dataset = reader(open_cache(url), prefetch_chunks=0)
    stream = iter(dataset)
    read = [next(stream)["input_ids"].tolist()]
    proxy.fail(SHARD, times=99, status=503)
    with pytest.raises(RemoteError):
        read.extend(batch["input_ids"].tolist() for batch in stream)
    assert read == whole[: len(read)]
    assert len(read) < 15  # less than an epoch, which needs every shard
    proxy.faults.clear()
    again = reader(open_cache(url), BATCHES - len(read))
    again.load_state_dict(dataset.state_dict())
    assert read + tokens_of(again) == whole


def _read_as_nobody(root: Path, told: Connection) -> None:
    if os.geteuid() == 0:  # whom no permission stops
        os.setuid(NOBODY)
    try:
        (root / "file").touch()
    except PermissionError:
        # Without loader workers: they pass tensors through a folder that root may have made before.
        told.send(tokens_of(reader(open_cache(root), BATCHES)))


def test_a_cache_that_can_only_be_read(cache: Cache, whole: list[Any]) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as shared:
        root = shutil.copytree(cache.root, Path(shared) / "cache")
        for path in [Path(shared), *Path(shared).rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        here, there = FORK.Pipe()
        child = FORK.Process(target=_read_as_nobody, args=(root, there))
        child.start()
        there.close()
        assert here.recv() == whole
        child.join()
        for path in [Path(shared), *Path(shared).rglob("*")]:
            path.chmod(0o755)
