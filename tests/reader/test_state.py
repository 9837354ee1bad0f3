"""The state of a CacheDataset: exact after any batch, with another split of the work too, and refused where foreign."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from logitcache.errors import TrainingError
from logitcache.store import Cache
from tests.caches import random_cache
from tests.reader.batches import (
    GLOBAL_BATCH,
    MANY_WORKERS,
    assert_same,
    global_batches,
    rank_reader,
    reader,
    tokens_of,
)

pytestmark = [MANY_WORKERS, pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return random_cache(tmp_path_factory.mktemp("state") / "cache")


@pytest.mark.parametrize("prefetch", [0, 4])
@pytest.mark.parametrize("taken", [0, 1, 5, 12, 13, 26])
def test_resume_after_any_batch(cache: Cache, taken: int, prefetch: int) -> None:
    """Twice in a row, through JSON."""
    whole = list(reader(cache, 32, prefetch_batches=prefetch))
    first = reader(cache, prefetch_batches=prefetch)
    stream = iter(first)
    for _ in range(taken):
        next(stream)
    state = json.loads(json.dumps(first.state_dict()))
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


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (4, 1), (8, 0)])
def test_resume_with_another_split(cache: Cache, world_size: int, workers: int) -> None:
    whole = global_batches(cache, 1, 0, 12)
    dataset = rank_reader(cache, 1, 2)
    for _ in islice(dataset, 5):
        pass
    assert global_batches(cache, world_size, workers, 7, dataset.state_dict()) == whole[5:]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_state_after_a_batch_made_by_a_worker(cache: Cache, workers: int) -> None:
    """The dataset of the main process does not see its workers' copies move; the batch knows its place."""
    whole = tokens_of(reader(cache, 20))
    dataset = reader(cache)
    loader = iter(DataLoader(dataset, batch_size=None, num_workers=workers))
    for _ in range(5):
        batch = next(loader)
    state = dataset.state_after(batch)
    assert state["samples_seen"] == 5 * GLOBAL_BATCH
    second = reader(cache, 15)
    second.load_state_dict(state)
    assert tokens_of(second) == whole[5:]


def test_a_dataset_goes_on_where_it_was_left(cache: Cache) -> None:
    dataset = reader(cache)
    parts = tokens_of(islice(dataset, 5)) + tokens_of(islice(dataset, 5))
    assert parts == tokens_of(reader(cache, 10))


# ------------------------------------------------------------------------------ torchdata.StatefulDataLoader


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_stateful_data_loader(cache: Cache, workers: int) -> None:
    """Mid-epoch, twice in a row, at places where the workers have yielded unequal numbers of batches."""
    whole = tokens_of(reader(cache, 17))

    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(reader(cache), batch_size=None, num_workers=workers)

    first = loader()
    begun = tokens_of(islice(first, 5))
    second = loader()
    second.load_state_dict(first.state_dict())
    middle = tokens_of(islice(second, 5))
    third = loader()
    third.load_state_dict(second.state_dict())
    assert begun + middle + tokens_of(islice(third, 7)) == whole


def test_the_state_of_a_worker_is_no_state_of_the_whole(cache: Cache) -> None:
    loader = StatefulDataLoader(reader(cache), batch_size=None, num_workers=2)
    next(iter(loader))
    state = loader.state_dict()["_snapshot"]["_worker_snapshots"]["worker_1"]["dataset_state"]
    assert state["worker"] == [1, 2]
    dataset = reader(cache)
    dataset.load_state_dict(state)
    with pytest.raises(
        TrainingError, match="worker 1 of 2 and does not tell worker 0 of 1 where to go on; resume with"
    ):
        next(iter(dataset))


# ------------------------------------------------------------------------------------------------- refusals


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


@pytest.mark.parametrize("seen", [None, "12", -4, 1.5])
def test_a_state_without_a_place_is_refused(cache: Cache, seen: Any) -> None:
    with pytest.raises(TrainingError, match="samples_seen"):
        reader(cache).load_state_dict({**reader(cache).state_dict(), "samples_seen": seen})
