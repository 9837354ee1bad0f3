"""CacheDataset: content of batches, one global order for every split of the work, exact state."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from logitcache.errors import DamagedCacheError, TrainingError
from logitcache.reader import Batch, CacheDataset, ReaderOptions, batch_targets, make_batch
from logitcache.store import Cache, open_cache
from logitcache.targets import DeviceTargets
from tests.caches import random_cache
from tests.faults import flip_bit

GLOBAL_BATCH = 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return random_cache(tmp_path_factory.mktemp("reader") / "cache")


def reader(cache: Cache, num_batches: int | None = None, **options: Any) -> CacheDataset:
    return CacheDataset(cache, ReaderOptions(**{"batch_blocks": GLOBAL_BATCH, **options}), num_batches)


def assert_same(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for name in one.keys() - {"targets"}:
        assert torch.equal(one[name], other[name]), name
    for name in one.get("targets", {}):
        np.testing.assert_array_equal(one["targets"][name], other["targets"][name], err_msg=name)


def tokens_of(batches: Iterator[Batch] | list[Batch]) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in batches]


def global_batches(cache: Cache, world_size: int, workers: int, count: int, state: Any = None) -> list[list[list[int]]]:
    """The token rows of each global batch, put together from all ranks."""
    of_ranks = []
    for rank in range(world_size):
        dataset = reader(
            cache, count, batch_blocks=GLOBAL_BATCH // world_size, seed=3, rank=rank, world_size=world_size
        )
        if state is not None:
            dataset.load_state_dict(state)
        of_ranks.append(tokens_of(DataLoader(dataset, batch_size=None, num_workers=workers)))
    assert {len(batches) for batches in of_ranks} == {count}
    return [list(chain.from_iterable(parts)) for parts in zip(*of_ranks, strict=True)]


# ------------------------------------------------------------------------------------------------ content


def test_a_batch_is_what_the_cache_holds(cache: Cache) -> None:
    """Three batches, the corpus' padded last block among them."""
    dataset = reader(cache, seed=1)
    order = dataset.order.epoch(0)
    place = int(np.flatnonzero(order == cache.num_blocks - 1)[0]) // GLOBAL_BATCH
    for number, batch in enumerate(islice(dataset, place + 1)):
        blocks = order[number * GLOBAL_BATCH : (number + 1) * GLOBAL_BATCH]
        if blocks.size < GLOBAL_BATCH:
            blocks = np.append(blocks, dataset.order.epoch(1)[: GLOBAL_BATCH - blocks.size])
        parts = [cache.read_blocks(int(block), int(block) + 1) for block in blocks]
        np.testing.assert_array_equal(batch["input_ids"], np.concatenate([part.tokens for part in parts]))
        for row, part in enumerate(parts):
            real = int(part.valid.sum())
            labels = batch["labels"][row]
            np.testing.assert_array_equal(labels[: real - 1], part.tokens[0, 1:real])
            assert (labels[real - 1 :] == -100).all()
            rows = slice(row * cache.block_length, (row + 1) * cache.block_length)
            alone = part.targets.to_device()
            width = alone.ids.shape[1]
            np.testing.assert_array_equal(batch["targets"]["ids"][rows, :width], alone.ids)
            assert (batch["targets"]["ids"][rows, width:] == -1).all()
            np.testing.assert_array_equal(batch["targets"]["weights"][rows, :width], alone.weights)
            for name in ("tail_mass", "label_logprob", "entropy", "threshold"):
                np.testing.assert_array_equal(batch["targets"][name][rows], getattr(alone, name))


def test_batch_targets(cache: Cache) -> None:
    batch = make_batch([cache.read_blocks(0, 3)])
    targets = batch_targets(batch, unbiased=True)
    assert isinstance(targets, DeviceTargets)
    assert targets.unbiased
    assert len(targets) == 3 * cache.block_length
    assert torch.equal(targets.ids, batch["targets"]["ids"])


def test_without_targets(cache: Cache) -> None:
    (plain,) = reader(cache, 1, with_targets=False)
    (full,) = reader(cache, 1)
    assert plain.keys() == {"input_ids", "labels"}
    assert torch.equal(plain["input_ids"], full["input_ids"])


@pytest.mark.parametrize("kind", ["counts", "logprob"])
def test_probabilities_and_samples(kind: str, tmp_path: Path) -> None:
    made = random_cache(tmp_path / kind, kind)
    (batch,) = reader(made, 1, stop_block=20)
    assert made.unbiased == (kind == "counts")
    # Probabilities are exact above 0, samples nowhere.
    assert (batch["targets"]["threshold"] == (0 if kind == "logprob" else np.inf)).all()


# ------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_split(cache: Cache, world_size: int, workers: int) -> None:
    """Fifteen batches: an epoch of 50 blocks and a part of the next."""
    dataset = reader(cache, seed=3)
    rows = [cache.read_blocks(int(block), int(block) + 1).tokens[0].tolist() for block in dataset.order.samples(0, 60)]
    expected = [rows[start : start + GLOBAL_BATCH] for start in range(0, 60, GLOBAL_BATCH)]
    assert global_batches(cache, world_size, workers, 15) == expected


def test_prefetching_changes_nothing(cache: Cache) -> None:
    plain = list(reader(cache, 14, prefetch_batches=0))
    for depth in (1, 4):
        for one, other in zip(plain, reader(cache, 14, prefetch_batches=depth), strict=True):
            assert_same(one, other)


def test_held_out_blocks_stay_unread(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    read = Cache.read_blocks

    def spy(self: Cache, start: int, stop: int) -> Any:
        seen.append((start, stop))
        return read(self, start, stop)

    monkeypatch.setattr(Cache, "read_blocks", spy)
    list(reader(cache, 30, first_block=3, stop_block=44))
    assert {block for start, stop in seen for block in range(start, stop)} == set(range(3, 44))


# ------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("prefetch", [0, 4])
@pytest.mark.parametrize("taken", [0, 1, 5, 12, 13, 26])
def test_resume_after_any_batch(cache: Cache, taken: int, prefetch: int) -> None:
    whole = list(reader(cache, 32, prefetch_batches=prefetch))
    first = reader(cache, prefetch_batches=prefetch)
    stream = iter(first)
    for _ in range(taken):
        next(stream)
    state = first.state_dict()
    stream.close()  # type: ignore[attr-defined]
    assert state["samples_seen"] == taken * GLOBAL_BATCH
    assert state["epoch"] == taken * GLOBAL_BATCH // cache.num_blocks

    second = reader(cache, prefetch_batches=prefetch)
    second.load_state_dict(state)
    middle = list(islice(second, 3))
    again = reader(cache, prefetch_batches=prefetch)
    again.load_state_dict(second.state_dict())
    rest = list(islice(again, 32 - taken - 3))
    for one, other in zip(whole[taken:], middle + rest, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (4, 1)])
def test_resume_with_another_split(cache: Cache, world_size: int, workers: int) -> None:
    whole = global_batches(cache, 1, 0, 18)
    dataset = reader(cache, seed=3, batch_blocks=2, rank=1, world_size=2)
    for _ in islice(dataset, 7):
        pass
    state = dataset.state_dict()
    assert global_batches(cache, world_size, workers, 11, state) == whole[7:]


def test_a_dataset_goes_on_where_it_was_left(cache: Cache) -> None:
    dataset = reader(cache)
    parts = tokens_of(islice(dataset, 5)) + tokens_of(islice(dataset, 5))
    assert parts == tokens_of(reader(cache, 10))


@pytest.mark.parametrize(
    ("change", "field"),
    [({"seed": 4}, "seed"), ({"stop_block": 40}, "blocks"), ({"first_block": 1}, "blocks")],
)
def test_state_of_another_run_is_refused(cache: Cache, change: dict[str, Any], field: str) -> None:
    state = reader(cache, **change).state_dict()
    with pytest.raises(TrainingError, match=f"resume from has {field} "):
        reader(cache).load_state_dict(state)


def test_state_of_another_cache_is_refused(cache: Cache, tmp_path: Path) -> None:
    other = random_cache(tmp_path / "other", seed=1)
    with pytest.raises(TrainingError, match="fingerprints"):
        reader(cache).load_state_dict(reader(other).state_dict())
    with pytest.raises(TrainingError, match="fingerprints None"):
        reader(cache).load_state_dict({})


@pytest.mark.parametrize(
    "options",
    [
        {"batch_blocks": 0},
        {"rank": 1},
        {"rank": -1},
        {"first_block": 50},
        {"stop_block": 51},
        {"first_block": 9, "stop_block": 9},
        {"first_block": -1},
    ],
)
def test_options_that_do_not_fit(cache: Cache, options: dict[str, int]) -> None:
    with pytest.raises(TrainingError):
        reader(cache, **options)


# ---------------------------------------------------------------------------------------------- prefetch


@pytest.fixture
def damaged(tmp_path: Path) -> Cache:
    """One bit of the fourth shard is flipped."""
    made = random_cache(tmp_path / "damaged")
    shard = tmp_path / "damaged" / "shards" / made.manifest.shards[3].file
    flip_bit(shard, 4 * shard.stat().st_size)
    return open_cache(made.root)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_damage_surfaces_in_the_consumer(damaged: Cache, prefetch: int) -> None:
    place = min(number for number, block in enumerate(reader(damaged).order.epoch(0)) if 15 <= block < 20)
    stream = iter(reader(damaged, prefetch_batches=prefetch))
    for _ in range(place // GLOBAL_BATCH):
        next(stream)
    with pytest.raises(DamagedCacheError, match="SHA-256"):
        next(stream)


def test_damage_surfaces_through_a_worker(damaged: Cache) -> None:
    with pytest.raises(DamagedCacheError, match="SHA-256"):
        list(DataLoader(reader(damaged, 13), batch_size=None, num_workers=2))


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "logitcache-reader"]


def test_stopping_early_ends_the_thread(cache: Cache) -> None:
    """The thread is waiting for room in a full queue, or making a batch, when the consumer leaves."""
    before = len(reader_threads())
    for taken in (1, 2, 3):
        stream = iter(reader(cache, prefetch_batches=1))
        for _ in range(taken):
            next(stream)
        assert len(reader_threads()) == before + 1
        stream.close()  # type: ignore[attr-defined]
        assert len(reader_threads()) == before
