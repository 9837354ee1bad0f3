"""Blocks that do not divide over shards, chunks, windows, batches and ranks (fault 21): all are read, nobody waits."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from logitcache.errors import DamagedCacheError
from logitcache.reader import CacheDataset, ReaderOptions
from logitcache.reader.order import CHUNKS_PER_WINDOW, SHARDS_PER_WINDOW
from logitcache.store import Cache, Geometry, open_cache
from tests.caches import random_cache
from tests.faults import flip_bit
from tests.ranks import run_ranks
from tests.reader.batches import block_tokens

# 53 blocks, the last of one token, in eight shards of three chunks but for the last, of two; three windows.
UNEVEN = Geometry(num_tokens=209, block_length=4, chunk_blocks=3, unit_blocks=7)
BLOCKS = 53


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return random_cache(tmp_path_factory.mktemp("uneven") / "cache", geometry=UNEVEN)


def test_nothing_divides(cache: Cache) -> None:
    shards = [shard.num_blocks for shard in cache.manifest.shards]
    assert (cache.num_blocks, shards[0], shards[-1]) == (BLOCKS, 7, 4)
    assert len(shards) % SHARDS_PER_WINDOW == 0  # the last one is not full
    assert len(cache.chunks) == 23
    assert len(cache.chunks) % CHUNKS_PER_WINDOW


def options_of(rank: int, world_size: int, batch_blocks: int, **options: int) -> ReaderOptions:
    return ReaderOptions.for_rank(batch_blocks * world_size, rank, world_size, seed=5, **options)


def read_by_rank(cache: Cache, world_size: int, batch_blocks: int, count: int, **options: int) -> list[list[list[int]]]:
    """Of each rank, the token rows of all blocks that it reads."""
    read = []
    for rank in range(world_size):
        dataset = CacheDataset(cache, options_of(rank, world_size, batch_blocks, **options), count)
        read.append(list(chain.from_iterable(batch.input_ids.tolist() for batch in dataset)))
    return read


@pytest.mark.parametrize(("world_size", "batch_blocks"), [(2, 1), (3, 2), (5, 3), (7, 1), (16, 1), (60, 1), (2, 40)])
def test_every_block_once_an_epoch(cache: Cache, world_size: int, batch_blocks: int) -> None:
    """Of 53 blocks and of the 31 in the middle; with more ranks than blocks, a batch holds more than an epoch."""
    for first, stop in ((0, BLOCKS), (11, 42)):
        size, number = world_size * batch_blocks, stop - first
        count = -(-3 * number // size)
        ranks = read_by_rank(cache, world_size, batch_blocks, count, first_block=first, stop_block=stop)
        assert {len(blocks) for blocks in ranks} == {count * batch_blocks}
        # Batches are cut from one sequence of epochs, rank after rank.
        rows = [blocks[place : place + batch_blocks] for place in range(0, count * batch_blocks, batch_blocks)
                for blocks in ranks]  # fmt: skip
        sequence = list(chain.from_iterable(rows))
        wanted = Counter(map(tuple, block_tokens(cache, range(first, stop))))
        for epoch in range(3):
            assert Counter(map(tuple, sequence[epoch * number : (epoch + 1) * number])) == wanted


def _read_together(root: str, batch_blocks: int, count: int) -> torch.Tensor:
    """This rank's blocks; after each batch the ranks meet, as for gradients."""
    read = []
    dataset = CacheDataset(open_cache(root), options_of(dist.get_rank(), dist.get_world_size(), batch_blocks), count)
    for batch in dataset:
        read.append(batch.input_ids)
        seen = torch.tensor([batch.samples_seen, -batch.samples_seen])
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        assert seen[0] == -seen[1] == batch.samples_seen
    return torch.cat(read)


def test_two_processes(cache: Cache, tmp_path: Path) -> None:
    """Through three epochs, whose ends lie inside batches."""
    ranks = run_ranks(_read_together, 2, tmp_path, str(cache.root), 5, 16)
    assert [rank.tolist() for rank in ranks] == read_by_rank(cache, 2, 5, 16)


def _first_error(root: str, batch_blocks: int) -> str:
    """What ends this rank's reading of a damaged cache, and that the other ranks learn of it when they next meet."""
    failed, message = torch.zeros(1), ""
    stream = iter(CacheDataset(open_cache(root), options_of(dist.get_rank(), dist.get_world_size(), batch_blocks)))
    while not failed:
        try:
            next(stream)
        except DamagedCacheError as error:
            failed, message = torch.ones(1), str(error)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
    return message


def test_damage_that_one_rank_meets_first(tmp_path: Path) -> None:
    """An error, not a wait: a rank that reads on can still be met."""
    made = random_cache(tmp_path / "cache", geometry=UNEVEN)
    shard = made.root / "shards" / made.manifest.shards[-1].file
    flip_bit(shard, 4 * shard.stat().st_size)
    messages = run_ranks(_first_error, 2, tmp_path, str(made.root), 2)
    assert any("its SHA-256 differs" in message for message in messages)
