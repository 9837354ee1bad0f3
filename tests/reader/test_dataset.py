"""CacheDataset: what is in its batches, what it reads, and which options it refuses."""

from __future__ import annotations

import threading
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcache.errors import TrainingError
from logitcache.reader import CacheDataset, ReaderOptions, batch_targets, make_batch
from logitcache.store import Cache, ChunkRef, Geometry
from logitcache.targets import DeviceTargets
from tests.caches import random_cache
from tests.reader.batches import GLOBAL_BATCH, assert_same, block_tokens, reader, tokens_of


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return random_cache(tmp_path_factory.mktemp("reader") / "cache")


# ------------------------------------------------------------------------------------------------ content


def test_a_batch_is_what_the_cache_holds(cache: Cache) -> None:
    """All batches up to the one with the corpus' padded last block."""
    dataset = reader(cache, seed=1)
    order = dataset.order.epoch(0)
    place = int(np.flatnonzero(order == cache.num_blocks - 1)[0]) // GLOBAL_BATCH
    for number, batch in enumerate(islice(dataset, place + 1)):
        blocks = dataset.order.samples(number * GLOBAL_BATCH, GLOBAL_BATCH)
        parts = [cache.read_blocks(int(block), int(block) + 1) for block in blocks]
        np.testing.assert_array_equal(batch["input_ids"], np.concatenate([part.tokens for part in parts]))
        targets = batch["targets"]
        for row, part in enumerate(parts):
            real = int(part.valid.sum())
            labels = batch["labels"][row]
            np.testing.assert_array_equal(labels[: real - 1], part.tokens[0, 1:real])
            assert (labels[real - 1 :] == -100).all()
            rows = slice(row * cache.block_length, (row + 1) * cache.block_length)
            alone = part.targets.to_device()
            width = alone.ids.shape[1]
            np.testing.assert_array_equal(targets["ids"][rows, :width], alone.ids)
            assert (targets["ids"][rows, width:] == -1).all()
            np.testing.assert_array_equal(targets["weights"][rows, :width], alone.weights)
            for name in ("tail_mass", "label_logprob", "entropy", "threshold"):
                np.testing.assert_array_equal(targets[name][rows], getattr(alone, name))


@pytest.mark.parametrize("kind", ["counts", "logprob"])
def test_batches_are_those_of_make_batch(kind: str, tmp_path: Path) -> None:
    """With blocks that end early, in the middle of the cache too."""
    short = Geometry(
        num_tokens=79, block_length=5, chunk_blocks=2, unit_blocks=4, short_blocks=[[1, 2], [4, 1], [9, 4]]
    )
    made = random_cache(tmp_path / "cache", kind, geometry=short)
    dataset = reader(made, 2 * made.num_blocks // GLOBAL_BATCH)
    for number, batch in enumerate(dataset):
        blocks = dataset.order.samples(number * GLOBAL_BATCH, GLOBAL_BATCH)
        expected = make_batch([made.read_blocks(int(block), int(block) + 1) for block in blocks])
        plain = batch.unpack()
        assert plain.keys() == expected.keys()
        for name in ("input_ids", "labels"):
            assert torch.equal(plain[name], expected[name])
            assert plain[name].dtype == torch.int64
        for name, value in expected["targets"].items():
            np.testing.assert_array_equal(plain["targets"][name], value, err_msg=name)
            assert plain["targets"][name].dtype == value.dtype
    assert made.unbiased == batch.targets.unbiased == (kind == "counts")
    assert made.has_exact_head == batch.targets.has_exact_head == (kind == "logprob")


def test_batch_targets(cache: Cache) -> None:
    batch = make_batch([cache.read_blocks(0, 3)])
    targets = batch_targets(batch, unbiased=True)
    assert isinstance(targets, DeviceTargets)
    assert targets.unbiased
    assert len(targets) == 3 * cache.block_length
    assert torch.equal(targets.ids, batch["targets"]["ids"])


def test_without_targets(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tokens are read."""
    (full,) = reader(cache, 1)
    monkeypatch.setattr(Cache, "read_rows", None)
    (plain,) = reader(cache, 1, with_targets=False)
    assert plain.keys() == {"input_ids", "labels"}
    for name in plain:
        assert torch.equal(plain[name], full[name])
    with pytest.raises(KeyError):
        plain["targets"]


def test_blocks_as_they_are_stored(cache: Cache) -> None:
    """Not shuffled, over the end of the epoch; the seed does not matter then, but shuffling does."""
    dataset = reader(cache, 14, shuffle=False)
    places = np.arange(14 * GLOBAL_BATCH) % cache.num_blocks
    assert list(chain.from_iterable(tokens_of(dataset))) == block_tokens(cache, places.tolist())
    state = dataset.state_dict()
    reader(cache, shuffle=False, seed=5).load_state_dict(state)
    with pytest.raises(TrainingError, match="seed None"):
        reader(cache).load_state_dict(state)


def test_prefetching_changes_nothing(cache: Cache) -> None:
    plain = list(reader(cache, 14, prefetch_batches=0))
    for options in ({"prefetch_batches": 1}, {"prefetch_chunks": 0}, {"prefetch_chunks": 30, "decode_threads": 4}):
        for one, other in zip(plain, reader(cache, 14, **options), strict=True):
            assert_same(one, other)


def test_held_out_blocks_stay_unread(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """No chunk is decoded that has only held-out blocks."""
    decoded: set[ChunkRef] = set()
    read = Cache.read_rows

    def spy(self: Cache, ref: ChunkRef, *memory: Any) -> Any:
        decoded.add(ref)
        return read(self, ref, *memory)

    monkeypatch.setattr(Cache, "read_rows", spy)
    batches = list(reader(cache, 41, first_block=4, stop_block=45, batch_blocks=1))
    assert sorted(chain.from_iterable(tokens_of(batches))) == sorted(block_tokens(cache, range(4, 45)))
    wanted = {ref for ref in cache.chunks if ref.first_block < 45 and ref.first_block + ref.num_blocks > 4}
    assert decoded == wanted
    assert len(wanted) < len(cache.chunks)


# ------------------------------------------------------------------------------------- threads and memory


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("logitcache-")]


def test_stopping_early_ends_the_threads(cache: Cache) -> None:
    """They are waiting, or making a batch, when the consumer leaves; or nobody closes the stream, but drops it."""
    assert not reader_threads()
    for taken in (1, 2, 3):
        stream = iter(reader(cache, prefetch_batches=1))
        for _ in range(taken):
            next(stream)
        assert {thread.name.rpartition("_")[0] for thread in reader_threads()} == {
            "logitcache-reader",
            "logitcache-decode",
        }
        if taken == 3:
            del stream
        else:
            stream.close()  # type: ignore[attr-defined]
        assert not reader_threads()


@pytest.mark.parametrize("shards", [4, 24])
def test_memory_does_not_depend_on_the_size_of_the_cache(shards: int, tmp_path: Path) -> None:
    """The most chunks held, and each chunk decoded once an epoch."""
    large = Geometry(num_tokens=shards * 4 * 2 * 3, block_length=3, chunk_blocks=2, unit_blocks=8)
    made = random_cache(tmp_path / "cache", geometry=large)
    assert len(made.chunks) == 4 * shards
    dataset = CacheDataset(made, ReaderOptions(2, prefetch_batches=2, prefetch_chunks=5), 2 * len(made.chunks) // 2)
    for _ in dataset:
        pass
    # Two windows, while one passes into the other.
    assert dataset.count.chunks.most_held == 8 + 8
    # The epoch, what the prefetched batches reach into the next one, and the chunks ahead of it.
    assert len(made.chunks) <= dataset.count.chunks.decoded <= len(made.chunks) + 8 + 5
    assert dataset.count.batches == len(made.chunks)


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_blocks": 0}, "at least one block a rank"),
        ({"rank": 1}, "rank 1 of 1"),
        ({"rank": -1}, "count ranks from 0"),
        ({"first_block": 50}, "which has 50 blocks"),
        ({"stop_block": 51}, r"\[0, 51\)"),
        ({"first_block": 9, "stop_block": 9}, r"\[9, 9\)"),
        ({"first_block": -1}, r"\[-1, 50\)"),
        ({"prefetch_batches": -1}, "prefetch_batches"),
        ({"decode_threads": 0}, "decode_threads"),
    ],
)
def test_options_that_do_not_fit(cache: Cache, options: dict[str, int], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        reader(cache, **options)


def test_a_world_size_that_does_not_divide_the_batch(cache: Cache) -> None:
    with pytest.raises(TrainingError, match="8 blocks cannot be split evenly over 3 ranks; choose a batch that"):
        ReaderOptions.for_rank(8, 0, 3)
    assert ReaderOptions.for_rank(8, 1, 4, seed=2) == ReaderOptions(2, seed=2, rank=1, world_size=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to pin memory for")
def test_pinned_memory_without_a_gpu() -> None:
    with pytest.raises(TrainingError, match="pin_memory is for copies to a GPU"):
        ReaderOptions(1, pin_memory=True)
