"""What the tests of the reader share."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from logitcache.reader import CacheDataset, PackedBatch, ReaderOptions
from logitcache.store import Cache

GLOBAL_BATCH = 4
MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def reader(cache: Any, num_batches: int | None = None, **options: Any) -> CacheDataset:
    """A dataset of batches of four blocks."""
    return CacheDataset(cache, ReaderOptions(**{"batch_blocks": GLOBAL_BATCH, **options}), num_batches)


def rank_reader(cache: Any, rank: int, world_size: int, num_batches: int | None = None, **options: Any) -> CacheDataset:
    """A rank's part of batches of eight blocks."""
    return CacheDataset(cache, ReaderOptions.for_rank(8, rank, world_size, seed=3, **options), num_batches)


def assert_same(one: PackedBatch, other: PackedBatch) -> None:
    assert one.keys() == other.keys()
    for name in one.keys() - {"targets"}:
        assert torch.equal(one[name], other[name]), name
    if "targets" in one:
        for name, value in one["targets"].items():
            np.testing.assert_array_equal(value, other["targets"][name], err_msg=name)


def tokens_of(batches: Iterable[PackedBatch]) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in batches]


def block_tokens(cache: Cache, blocks: Iterable[int]) -> list[list[int]]:
    """The token row of each block."""
    return [cache.read_blocks(int(block), int(block) + 1).tokens[0].tolist() for block in blocks]


def global_batches(cache: Any, world_size: int, workers: int, count: int, state: Any = None) -> list[list[list[int]]]:
    """The token rows of each global batch of eight blocks, put together from all ranks."""
    of_ranks = []
    for rank in range(world_size):
        dataset = rank_reader(cache, rank, world_size, count)
        if state is not None:
            dataset.load_state_dict(state)
        of_ranks.append(tokens_of(DataLoader(dataset, batch_size=None, num_workers=workers)))
    assert {len(batches) for batches in of_ranks} == {count}
    return [list(chain.from_iterable(parts)) for parts in zip(*of_ranks, strict=True)]
