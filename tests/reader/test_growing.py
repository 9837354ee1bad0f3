"""Reading while the dump still runs (fault 27): a snapshot that is pinned, or a refusal."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path

import pytest

from logitcache.errors import TrainingError
from logitcache.reader import AveragedCaches, MixedCaches
from logitcache.store import CacheWriter, open_cache
from tests.caches import MANY_SHARDS
from tests.reader.batches import global_batches, reader, tokens_of
from tests.store.caches import commit, content, identity

UNITS = 4


def begun(root: Path, units: int = UNITS) -> CacheWriter:
    """A dump that has written its first units: five blocks each, of fifty in all."""
    tokens, targets = content("counts", 0, MANY_SHARDS)
    writer = CacheWriter.open(root, identity("counts", 0, MANY_SHARDS))
    for unit in range(units):
        commit(writer, unit, tokens, targets)
    return writer


def finish(writer: CacheWriter) -> None:
    tokens, targets = content("counts", 0, MANY_SHARDS)
    for unit in writer.pending_units():
        commit(writer, unit, tokens, targets)
    writer.finalize()


def test_batches_while_units_are_committed(tmp_path: Path) -> None:
    """The dump writes the other units and its manifest while a reader goes through two epochs of what was there."""
    writer = begun(tmp_path / "cache")
    dataset = reader(open_cache(tmp_path / "cache", partial=True).snapshot())
    assert sorted(dataset.order.epoch(0)) == list(range(20))
    stream = iter(dataset)
    read = tokens_of(islice(stream, 3))
    dump = threading.Thread(target=finish, args=(writer,))
    dump.start()
    read += tokens_of(islice(stream, 3))
    dump.join()
    read += tokens_of(islice(stream, 4))
    assert read == tokens_of(reader(open_cache(tmp_path / "cache").snapshot(UNITS), 10))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_state_goes_on_when_the_dump_has_finished(tmp_path: Path, world_size: int) -> None:
    writer = begun(tmp_path / "cache")
    first = open_cache(tmp_path / "cache", partial=True).snapshot()
    whole = global_batches(first, 1, 0, 9)
    dataset = reader(first, batch_blocks=8, seed=3)
    assert tokens_of(islice(dataset, 4)) == whole[:4]
    finish(writer)
    later = open_cache(tmp_path / "cache").snapshot(UNITS)
    assert global_batches(later, world_size, 0, 5, dataset.state_dict()) == whole[4:]


def test_the_state_of_another_snapshot_is_refused(tmp_path: Path) -> None:
    """The same dump, later: another order, so going on would repeat and miss blocks."""
    writer = begun(tmp_path / "cache")
    state = reader(open_cache(tmp_path / "cache", partial=True).snapshot()).state_dict()
    finish(writer)
    for cache in (open_cache(tmp_path / "cache"), open_cache(tmp_path / "cache").snapshot(UNITS + 1)):
        with pytest.raises(TrainingError, match="resume from has fingerprints"):
            reader(cache).load_state_dict(state)


def test_an_unfinished_cache_without_a_snapshot_is_refused(tmp_path: Path) -> None:
    begun(tmp_path / "cache")
    growing = open_cache(tmp_path / "cache", partial=True)
    for read in (reader, lambda cache: AveragedCaches([cache]), lambda cache: MixedCaches([cache], [1.0])):
        with pytest.raises(TrainingError, match=r"is unfinished; read a snapshot of it, cache\.snapshot\(\), which"):
            read(growing)


def test_averages_are_of_equal_snapshots(tmp_path: Path) -> None:
    begun(tmp_path / "one")
    begun(tmp_path / "two", UNITS + 1)
    one, two = (open_cache(tmp_path / name, partial=True) for name in ("one", "two"))
    with pytest.raises(TrainingError, match="cannot be averaged: number of blocks is 20 and 25"):
        AveragedCaches([one.snapshot(), two.snapshot()])
    average = AveragedCaches([one.snapshot(), two.snapshot(UNITS)])
    assert tokens_of(reader(average, 5)) == tokens_of(reader(AveragedCaches([two.snapshot(UNITS)] * 2), 5))
