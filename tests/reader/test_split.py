"""One sequence of global batches, however the work is split over ranks and loader workers."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from logitcache.reader import MixedCaches
from logitcache.store import Cache, open_cache
from tests.caches import random_cache
from tests.reader.batches import MANY_WORKERS, block_tokens, global_batches, rank_reader, tokens_of

pytestmark = MANY_WORKERS


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return random_cache(tmp_path_factory.mktemp("split") / "cache")


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_global_batches_do_not_depend_on_the_split(cache: Cache, world_size: int, workers: int) -> None:
    """Eight batches of eight blocks: an epoch of 50 blocks and a part of the next."""
    rows = block_tokens(cache, rank_reader(cache, 0, 1).order.samples(0, 64))
    expected = [rows[start : start + 8] for start in range(0, 64, 8)]
    assert global_batches(cache, world_size, workers, 8) == expected


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (4, 3)])
def test_mixed_caches_do_not_depend_on_it_either(cache: Cache, world_size: int, workers: int, tmp_path: Path) -> None:
    mixed = MixedCaches([cache, random_cache(tmp_path / "other", seed=1)], [0.7, 0.3], [(0, 50), (5, 20)])
    assert global_batches(mixed, world_size, workers, 6) == global_batches(mixed, 1, 0, 6)


def _rank(rank: int, world_size: int, root: Path, meeting: Path, out: Path) -> None:
    """One of several processes: reads its part, and rank 0 writes what all have read."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    read: list[Any] = []
    for batch in rank_reader(open_cache(root), rank, world_size, 8):
        parts = [torch.empty_like(batch.input_ids) for _ in range(world_size)]
        torch.distributed.all_gather(parts, batch.input_ids)
        read.append(torch.cat(parts).tolist())
    if rank == 0:
        torch.save(read, out)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2])
def test_processes_that_meet_by_gloo(cache: Cache, world_size: int, tmp_path: Path) -> None:
    context, out = multiprocessing.get_context("fork"), tmp_path / "read.pt"
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, cache.root, tmp_path / "meeting", out))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    assert torch.load(out, weights_only=True) == global_batches(cache, 1, 0, 8)


def test_every_rank_has_as_many_batches(cache: Cache) -> None:
    """Fifty blocks in shards of five over four ranks: no rank runs dry before the others, so nobody waits for it."""
    lengths = [len(tokens_of(rank_reader(cache, rank, 4, 25))) for rank in range(4)]
    assert lengths == [25] * 4
