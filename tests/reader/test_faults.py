"""Damage, dead workers, forks and signals while reading: an error or success, never a hang."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from logitcache.errors import DamagedCacheError, TrainingError
from logitcache.store import Cache, open_cache
from tests.caches import random_cache
from tests.faults import flip_bit
from tests.reader.batches import GLOBAL_BATCH, reader, tokens_of

LEAVING = """
import sys
from logitcache.reader import CacheDataset, ReaderOptions
from logitcache.store import open_cache

stream = iter(CacheDataset(open_cache(sys.argv[1]), ReaderOptions(2)))
print(next(stream))
"""
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return random_cache(tmp_path_factory.mktemp("faults") / "cache")


@pytest.fixture
def damaged(tmp_path: Path) -> Cache:
    """One bit of the fourth shard is flipped."""
    made = random_cache(tmp_path / "damaged")
    flip_bit(fourth_shard(made), 4 * fourth_shard(made).stat().st_size)
    return open_cache(made.root)


def fourth_shard(cache: Cache) -> Path:
    return cache.root / "shards" / cache.manifest.shards[3].file


def batches_before_damage(cache: Cache) -> int:
    order = reader(cache).order.epoch(0)
    return min(number for number, block in enumerate(order) if 15 <= block < 20) // GLOBAL_BATCH


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_damage_surfaces_in_the_consumer(damaged: Cache, prefetch: int) -> None:
    """After all batches before it; what was read can be gone on from once the shard is restored."""
    whole_batches = batches_before_damage(damaged)
    dataset = reader(damaged, prefetch_batches=prefetch)
    begun: list[Any] = []
    with pytest.raises(DamagedCacheError, match="SHA-256 differs; restore it, or remove it and dump again") as raised:
        begun.extend(tokens_of_each(dataset))
    assert raised.value.shard == fourth_shard(damaged).name
    assert str(fourth_shard(damaged)) in str(raised.value)
    assert len(begun) == whole_batches

    flip_bit(fourth_shard(damaged), 4 * fourth_shard(damaged).stat().st_size)
    again = reader(open_cache(damaged.root), 13 - whole_batches)
    again.load_state_dict(dataset.state_dict())
    assert begun + tokens_of(again) == tokens_of(reader(open_cache(damaged.root), 13))


def tokens_of_each(dataset: Any) -> Any:
    for batch in dataset:
        yield batch["input_ids"].tolist()


def test_damage_after_the_shard_was_checked(tmp_path: Path) -> None:
    """A shard's hash is looked at once; a chunk's checksum each time it is read."""
    made = random_cache(tmp_path / "cache")
    shard = fourth_shard(made)
    made.read_blocks(15, 20)
    place = shard.read_bytes().index(b"ids/c/1/0") + 60
    flip_bit(shard, 8 * place)
    with pytest.raises(DamagedCacheError, match=r"chunk 1 .*; restore the file, or remove it and dump again") as raised:
        list(reader(made, 13))
    assert raised.value.shard == shard.name
    assert raised.value.chunk == 1


def test_damage_surfaces_through_a_worker(damaged: Cache) -> None:
    with pytest.raises(DamagedCacheError, match="SHA-256"):
        list(DataLoader(reader(damaged, 13), batch_size=None, num_workers=2))


def test_a_shard_that_is_gone(tmp_path: Path) -> None:
    made = random_cache(tmp_path / "cache")
    fourth_shard(made).unlink()
    with pytest.raises(DamagedCacheError, match="is missing; restore it or dump again"):
        list(reader(made, 13))


def _lose_a_worker(loader: type[Any], cache: Cache) -> None:
    dataset = reader(cache)
    own = iter(dataset)
    next(own)  # so that threads of this process decode when the workers are forked
    stream: Any = iter(loader(dataset, batch_size=None, num_workers=2))
    next(stream)
    os.kill(stream._workers[0].pid, signal.SIGKILL)
    for _ in stream:
        pass


@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
def test_a_worker_that_is_killed(cache: Cache, loader: type[Any]) -> None:
    """An error ends the process. One of its own: torch raises wherever it happens to be when its worker dies."""
    child = FORK.Process(target=_lose_a_worker, args=(loader, cache))
    child.start()
    child.join(120)
    assert child.exitcode == 1


def test_workers_forked_while_this_process_reads(cache: Cache) -> None:
    """Decoding threads are at work when the workers fork off; they share the open cache and the dataset."""
    dataset = reader(cache, 20)
    whole = tokens_of(reader(cache, 20))
    stream = iter(dataset)
    begun = [next(stream)["input_ids"].tolist() for _ in range(3)]
    inside = tokens_of(islice(DataLoader(dataset, batch_size=None, num_workers=2), 10))
    assert inside == whole[3:13]
    assert begun + [batch["input_ids"].tolist() for batch in stream] == whole


def _go_on(stream: Any, told: Connection) -> None:
    try:
        told.send(tokens_of(islice(stream, 5)))
    except TrainingError as error:
        told.send(str(error))


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_a_fork_that_goes_on_with_the_iterator(cache: Cache, prefetch: int) -> None:
    """Its threads stayed behind: without any it reads, with some it is told so; both leave the parent's as it was."""
    whole = tokens_of(reader(cache, 12))
    stream = iter(reader(cache, prefetch_batches=prefetch))
    begun = tokens_of(islice(stream, 3))
    here, there = FORK.Pipe()
    child = FORK.Process(target=_go_on, args=(stream, there))
    child.start()
    there.close()
    said = here.recv()
    child.join()
    assert child.exitcode == 0
    if prefetch:
        assert re.fullmatch(r"this iterator was begun in process \d+ and cannot go on in a fork of it.*", said)
    else:
        assert said == whole[3:8]
    assert begun + tokens_of(islice(stream, 9)) == whole


def test_a_fork_that_reads_anew(cache: Cache) -> None:
    """A dataset of its own place, while the parent's threads are at work and after."""
    dataset = reader(cache)
    whole = tokens_of(reader(cache, 8))
    stream = iter(dataset)
    next(stream)
    here, there = FORK.Pipe()
    child = FORK.Process(target=_go_on, args=(dataset, there))
    child.start()
    there.close()
    assert here.recv() == whole[1:6]
    child.join()
    assert child.exitcode == 0
    assert tokens_of(islice(stream, 7)) == whole[1:]


def _read_until_interrupted(cache: Cache, told: Connection) -> None:
    try:
        for number, _ in enumerate(reader(cache)):
            if number == 5:
                told.send("reading")
    except KeyboardInterrupt:
        told.send([thread.name for thread in threading.enumerate()])


def test_interrupt(cache: Cache) -> None:
    """It reaches the consumer, and no thread is left."""
    here, there = FORK.Pipe()
    child = FORK.Process(target=_read_until_interrupted, args=(cache, there))
    child.start()
    there.close()
    assert here.poll(120)
    assert here.recv() == "reading"
    assert child.pid is not None
    os.kill(child.pid, signal.SIGINT)
    assert here.poll(120)
    assert here.recv() == ["MainThread"]
    child.join(120)
    assert child.exitcode == 0


def test_leaving_with_an_open_stream(cache: Cache) -> None:
    """The interpreter goes away while threads decode."""
    command = [sys.executable, "-c", LEAVING, str(cache.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "PackedBatch(2 x 5 tokens on cpu)\n", "")
