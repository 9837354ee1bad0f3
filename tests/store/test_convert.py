"""Caches in the other container: equal planes, records and rows, whatever interrupts the conversion."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from logitcache.errors import CacheError, DamagedCacheError, PlanMismatchError, UsageError
from logitcache.store import Ancestor, CacheWriter, convert, open_cache, verify
from logitcache.store.layout import ContainerKind, Layout
from tests.codec.rows import assert_equal
from tests.faults import flip_bit, run_killed
from tests.store.caches import CONTAINERS, commit, content, files_of, identity, make_cache

OTHER: dict[ContainerKind, ContainerKind] = {"zarr": "arrow", "arrow": "zarr"}


def check_equal(one: Path, two: Path) -> None:
    """Two caches hold the same planes in the same types, the same tables, and read the same."""
    mine, theirs = open_cache(one), open_cache(two)
    assert mine.chunks == theirs.chunks
    pairs = [(mine.read_planes(ref), theirs.read_planes(ref)) for ref in mine.chunks]
    for ours, others in [*pairs, (mine.read_codebook(), theirs.read_codebook())]:
        assert ours.keys() == others.keys()
        for name, plane in ours.items():
            assert plane.dtype == others[name].dtype
            np.testing.assert_array_equal(plane, others[name])
    read, other = (cache.read_blocks(0, cache.num_blocks) for cache in (mine, theirs))
    np.testing.assert_array_equal(read.tokens, other.tokens)
    assert_equal(read.targets, other.targets)
    for name in ("num_tokens", "num_blocks", "num_entries", "unit", "first_block"):
        assert [getattr(shard, name) for shard in mine.manifest.shards] == [
            getattr(shard, name) for shard in theirs.manifest.shards
        ]
    assert mine.manifest.counters == theirs.manifest.counters
    assert verify(two).ok


@pytest.mark.parametrize("kind", ["counts", "logprob"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_both_ways(tmp_path: Path, kind: str, container: ContainerKind) -> None:
    """There and back gives the first cache's shards, byte for byte but for the identity in them."""
    made = make_cache(tmp_path / "cache", kind, container=container)
    seen: list[tuple[int, int]] = []
    manifest = convert(made.root, tmp_path / "there", OTHER[container], lambda *done: seen.append(done))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    check_equal(made.root, tmp_path / "there")
    first = Ancestor(
        operation="convert", arguments={"container": OTHER[container]}, parents=[open_cache(made.root).fingerprint]
    )
    assert manifest.identity == identity(kind, container=OTHER[container]).model_copy(update={"ancestry": [first]})
    back = convert(tmp_path / "there", tmp_path / "back", container)
    check_equal(made.root, tmp_path / "back")
    assert back.identity.ancestry == [
        first,
        Ancestor(operation="convert", arguments={"container": container}, parents=[manifest.fingerprint]),
    ]
    assert back.fingerprint != open_cache(made.root).fingerprint


def test_again_changes_nothing(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache")
    one = convert(made.root, tmp_path / "arrow", "arrow")
    before = files_of(tmp_path / "arrow")
    assert convert(made.root, tmp_path / "arrow", "arrow") == one
    assert files_of(tmp_path / "arrow") == before


def test_counters_are_kept(tmp_path: Path) -> None:
    tokens, targets = content()
    writer = CacheWriter.open(tmp_path / "cache", identity())
    commit(writer, 0, tokens, targets)
    commit(writer, 2, tokens, targets)
    whole = open_cache(make_cache(tmp_path / "whole").root)
    chunks = [whole.read_planes(ref) for ref in whole.chunks if ref.shard == 1]
    writer.commit_unit(1, chunks, {"masked": 3})
    writer.finalize()
    convert(tmp_path / "cache", tmp_path / "arrow", "arrow")
    check_equal(tmp_path / "cache", tmp_path / "arrow")
    records = [json.loads(path.read_text())["counters"] for path in sorted((tmp_path / "arrow/commits").iterdir())]
    assert records == [{}, {"masked": 3}, {}]
    (tmp_path / "cache" / "commits" / "000001.json").unlink()
    with pytest.raises(DamagedCacheError, match=r"commits lacks records of units, which hold counters; restore them$"):
        convert(tmp_path / "cache", tmp_path / "again", "arrow")


def convert_job(source: Path, out: Path) -> None:
    convert(source, out, "arrow")


FAILPOINTS = ["codebook.written", "commit.after_rename", "commit.after_link", "manifest.before_write"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_killed_and_resumed(tmp_path: Path) -> None:
    """One kill after the other on one output; the end is that of a conversion nobody interrupted."""
    made = make_cache(tmp_path / "cache")
    convert(made.root, tmp_path / "whole", "arrow")
    out = tmp_path / "out"
    for failpoint in FAILPOINTS:
        run_killed(multiprocessing.get_context("fork"), convert_job, made.root, out, failpoint=failpoint)
        assert verify(out).ok
        assert not (out / "manifest.json").exists()
    convert(made.root, out, "arrow")
    whole = files_of(tmp_path / "whole")
    assert {name: data for name, data in files_of(out).items() if name in whole} == whole
    assert verify(out).ok


def test_what_is_refused(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache")
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match=r"cache has container zarr already; choose the other --container$"):
        convert(made.root, tmp_path / "new", "zarr")
    with pytest.raises(UsageError, match=r"cache is the cache to read from; choose another folder for --out$"):
        convert(made.root, made.root, "arrow")
    with pytest.raises(UsageError, match=r"lies inside the cache .*cache; choose another folder for --out$"):
        convert(made.root, made.root / "inside", "arrow")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"is not empty and not a logitcache cache \(it holds 'notes.txt'\)"):
        convert(made.root, tmp_path / "mine", "arrow")
    make_cache(tmp_path / "unfinished", units=range(2))
    with pytest.raises(CacheError, match=r"is unfinished; run the command that began it again to finish it"):
        convert(tmp_path / "unfinished", tmp_path / "new", "arrow")
    other = make_cache(tmp_path / "other", seed=1)
    convert(other.root, tmp_path / "arrow", "arrow")
    with pytest.raises(PlanMismatchError, match=r"was begun with other arguments"):
        convert(made.root, tmp_path / "arrow", "arrow")
    assert not (tmp_path / "new").exists()
    assert before.items() <= files_of(tmp_path).items()


def test_damage_is_not_copied(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache")
    cache = open_cache(made.root)
    path = Layout(made.root).shards / cache.manifest.shards[1].file
    flip_bit(path, 8 * 700)
    with pytest.raises(DamagedCacheError, match=r"its SHA-256 differs; restore it, or remove it and dump again$"):
        convert(made.root, tmp_path / "arrow", "arrow")
    assert verify(tmp_path / "arrow").unfinished
    flip_bit(path, 8 * 700)
    convert(made.root, tmp_path / "arrow", "arrow")
    check_equal(made.root, tmp_path / "arrow")
