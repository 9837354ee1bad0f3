"""Opening and reading caches."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.errors import CacheError, DamagedCacheError, UsageError
from logitcache.store import Cache, open_cache, verify
from logitcache.store.layout import Layout
from tests.codec.rows import assert_equal
from tests.store.caches import GEOMETRY, VOCABULARY, Made, make_cache

KINDS = [("counts", "zarr"), ("logprob", "zarr"), ("counts", "arrow")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    kind, container = request.param
    return make_cache(tmp_path_factory.mktemp("cache") / "cache", kind, container=container)


def test_every_range_of_blocks(made: Made) -> None:
    """Inside chunks, across chunk and shard borders, and the padded last block."""
    cache = open_cache(made.root)
    cache.keep_chunks(8)
    for start in range(GEOMETRY.num_blocks):
        for stop in range(start + 1, GEOMETRY.num_blocks + 1):
            made.check(cache.read_blocks(start, stop), start, stop)


def test_facts(made: Made) -> None:
    for location in (made.root, str(made.root), f"file://{made.root}"):
        cache = open_cache(location)
        assert (cache.num_tokens, cache.num_blocks, cache.block_length, cache.vocab_size) == (103, 21, 5, VOCABULARY)
        assert cache.unbiased == made.targets.unbiased
        assert cache.fingerprint == cache.manifest.fingerprint
        assert [chunk.num_blocks for chunk in cache.chunks] == [3, 3, 2, 3, 3, 2, 3, 2]
        assert repr(cache) == f"Cache({str(made.root)!r}, 103 tokens in 21 blocks)"
        assert cache.num_bytes == sum(path.stat().st_size for path in made.root.rglob("*") if path.is_file())


def test_labels(made: Made) -> None:
    labels = open_cache(made.root).read_blocks(0, 21).labels()
    expected = np.full((21, 5), -100)
    for position in range(103):
        if position % 5 < 4 and position + 1 < 103:
            expected[position // 5, position % 5] = made.tokens[position + 1]
    np.testing.assert_array_equal(labels, expected)


def test_ranges_that_are_not_there(made: Made) -> None:
    cache = open_cache(made.root)
    for start, stop in ((-1, 2), (0, 22), (5, 5), (7, 3), (21, 22)):
        with pytest.raises(CacheError, match=rf"^blocks \[{start}, {stop}\) are outside .*, which holds \[0, 21\)$"):
            cache.read_blocks(start, stop)


def test_few_chunks_are_kept(made: Made) -> None:
    cache = open_cache(made.root)
    for ref in cache.chunks:
        cache.read_chunk(ref)
    assert len(cache._decoded) == 4
    assert cache.read_chunk(cache.chunks[-4]) is cache.read_chunk(cache.chunks[-4])
    cache.keep_chunks(6)
    cache.keep_chunks(2)
    for ref in cache.chunks:
        cache.read_chunk(ref)
    assert len(cache._decoded) == 6


def test_reading_after_close(made: Made) -> None:
    cache = open_cache(made.root)
    cache.read_blocks(0, 21)
    cache.close()
    made.check(cache.read_blocks(0, 21), 0, 21)


# ---------------------------------------------------------------------------------------------- sharing


def test_a_pickled_cache_reads(made: Made) -> None:
    cache = open_cache(made.root)
    cache.read_blocks(3, 9)
    copy = pickle.loads(pickle.dumps(cache))
    made.check(copy.read_blocks(0, 21), 0, 21)


def test_threads_read_the_same(made: Made) -> None:
    """Eight threads in different places evict each other's chunks all the time."""
    cache = open_cache(made.root)
    cache._kept_chunks = 1
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        try:
            for block in np.random.default_rng(seed).integers(0, 21, 60):
                made.check(cache.read_blocks(int(block), int(block) + 1), int(block), int(block) + 1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Forgetful(OrderedDict[Any, Any]):
    """What is asked for is gone a moment later, as if another thread had evicted it in between."""

    def get(self, key: Any, default: Any = None) -> Any:
        value = super().get(key, default)
        self.clear()
        return value


def test_a_chunk_evicted_while_it_is_read(made: Made) -> None:
    cache = open_cache(made.root)
    cache._decoded = Forgetful()
    for _ in range(3):
        made.check(cache.read_blocks(0, 2), 0, 2)


def _child_reads(cache: Cache, made: Made, parent: int) -> None:
    assert os.getpid() != parent
    made.check(cache.read_blocks(0, 21), 0, 21)
    os._exit(7)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_of_an_open_cache_reads(made: Made) -> None:
    """Parent and child both go on reading: they must not share a file position, nor zarr's event loop."""
    cache = open_cache(made.root)
    cache.read_blocks(0, 2)
    children = [
        multiprocessing.get_context("fork").Process(target=_child_reads, args=(cache, made, os.getpid()))
        for _ in range(3)
    ]
    for child in children:
        child.start()
    made.check(cache.read_blocks(0, 21), 0, 21)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [7, 7, 7]


# ---------------------------------------------------------------------------------------------- unfinished


def test_an_unfinished_cache(tmp_path: Path) -> None:
    """It verifies, reads up to its commits, and says what is missing."""
    made = make_cache(tmp_path / "cache", units=range(2))
    with pytest.raises(CacheError, match=r"is unfinished; run the command that began it again to finish it"):
        open_cache(made.root)
    cache = open_cache(made.root, partial=True)
    assert (cache.num_tokens, cache.num_blocks) == (80, 21)
    made.check(cache.read_blocks(0, 16), 0, 16)
    with pytest.raises(CacheError, match=r"^block 16 of .* is not dumped yet; run the same dump again to finish it$"):
        cache.read_blocks(15, 17)
    report = verify(made.root)
    assert (report.ok, report.unfinished, report.shards, report.tokens) == (True, True, 2, 80)


def test_an_unfinished_cache_with_a_hole(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache")
    layout = Layout(made.root)
    layout.manifest.unlink()
    layout.commit(1).unlink()
    cache = open_cache(made.root, partial=True)
    made.check(cache.read_blocks(0, 8), 0, 8)
    made.check(cache.read_blocks(16, 21), 16, 21)
    for block in (8, 15):
        with pytest.raises(CacheError, match=rf"^block {block} of .* is not dumped yet"):
            cache.read_blocks(block, block + 1)
    report = verify(made.root)
    assert (report.ok, report.unfinished, report.tokens) == (True, True, 63)


def test_a_cache_without_commits(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", units=range(0))
    report = verify(made.root)
    assert (report.ok, report.unfinished, report.shards) == (True, True, 0)
    with pytest.raises(CacheError, match=r"^block 0 of .* is not dumped yet"):
        open_cache(made.root, partial=True).read_blocks(0, 1)


def test_a_whole_manifest_without_a_plan_opens(tmp_path: Path) -> None:
    """Readers need the manifest alone; `verify` says what is gone."""
    made = make_cache(tmp_path / "cache")
    Layout(made.root).plan.unlink()
    made.check(open_cache(made.root).read_blocks(0, 21), 0, 21)
    report = verify(made.root)
    assert [problem.what for problem in report.problems] == [
        f"{made.root}/plan.json cannot be read: No such file or directory; check that it is there and may be read, and "
        "the disk"
    ]


def test_a_read_only_cache(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache")
    for path in [*made.root.rglob("*"), made.root]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(path for path in made.root.rglob("*"))
    made.check(open_cache(made.root).read_blocks(0, 21), 0, 21)
    assert verify(made.root).ok
    assert sorted(path for path in made.root.rglob("*")) == before
    for path in [made.root, *made.root.rglob("*")]:
        path.chmod(0o755)


# ---------------------------------------------------------------------------------------------- no cache


def test_what_is_not_a_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("hello")
    (tmp_path / "empty").mkdir()
    for location in (tmp_path / "absent", file):
        for act in (open_cache, verify):
            with pytest.raises(CacheError, match=rf"^{location} does not exist or is not a folder; give the folder"):
                act(location)
    with pytest.raises(
        CacheError, match=r"empty is not a logitcache cache: it has no manifest.json and no plan.json; give the folder"
    ):
        open_cache(tmp_path / "empty")
    for url in ("https://host/cache", "http://169.254.169.254/x", "simplecache::file:///etc"):
        with pytest.raises(UsageError, match=r"is not supported; give a folder, file:// or s3://$"):
            open_cache(url)


def test_orphans_and_temporary_files_are_ignored(made: Made, tmp_path: Path) -> None:
    copy = made.copy(tmp_path / "copy")
    for name in (
        "shards/000000-ffffffffffff.zarr.zip",
        "shards/000000-ffffffffffff.arrow",
        "shards/000009.x.tmp",
        "commits/000000.y.tmp",
        "manifest.json.z.tmp",
    ):
        (copy.root / name).write_bytes(b"left behind")
    assert verify(copy.root).ok
    cache = open_cache(copy.root)
    copy.check(cache.read_blocks(0, 21), 0, 21)
    assert cache.fingerprint == open_cache(made.root).fingerprint


def test_verify_counts(made: Made) -> None:
    report = verify(made.root)
    files = sum(path.stat().st_size for path in made.root.rglob("*") if path.is_file())
    assert (report.ok, report.unfinished, report.shards, report.tokens) == (True, False, 3, 103)
    assert report.num_bytes == files


def test_reading_does_not_change_what_was_read(made: Made) -> None:
    """Blocks share memory with the chunk that is kept; reading others must not touch it."""
    cache = open_cache(made.root)
    first = cache.read_blocks(2, 5)
    kept = first.targets.weights.copy()
    for _ in range(2):
        cache.read_blocks(0, 21)
    np.testing.assert_array_equal(first.targets.weights, kept)
    assert_equal(first.targets, cache.read_blocks(2, 5).targets)


def test_a_shard_that_vanishes_after_opening(made: Made, tmp_path: Path) -> None:
    copy = made.copy(tmp_path / "copy")
    cache = open_cache(copy.root)
    (Layout(copy.root).shards / cache.manifest.shards[1].file).unlink()
    copy.check(cache.read_blocks(0, 8), 0, 8)
    with pytest.raises(DamagedCacheError, match=r"is missing; restore it or dump again$") as caught:
        cache.read_blocks(0, 21)
    assert caught.value.shard == cache.manifest.shards[1].file
