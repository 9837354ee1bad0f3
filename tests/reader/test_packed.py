"""PackedBatch: one buffer, and what comes out of it on a device."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from logitcache.losses import distillation_loss
from logitcache.reader import PackedBatch
from logitcache.reader.packed import _spread_by_index, _spread_by_mask
from logitcache.store import Cache
from tests.caches import random_cache
from tests.reader.batches import assert_same, reader


@pytest.fixture(scope="module", params=["counts", "logprob"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return random_cache(tmp_path_factory.mktemp("packed") / "cache", request.param)


def first_batch(cache: Cache, **options: Any) -> PackedBatch:
    (batch,) = reader(cache, 1, **options)
    return batch


def test_one_buffer_holds_everything(cache: Cache) -> None:
    """Ids, weights, offsets and tokens in 4 bytes each, four columns of rows, and little between them."""
    batch = first_batch(cache)
    rows, entries = 4 * cache.block_length, int((batch.targets.ids >= 0).sum())
    assert batch.buffer.dtype == torch.uint8
    least = 4 * (2 * entries + 6 * rows + 4 + 1)
    assert least <= batch.buffer.numel() < least + 9 * 16
    assert batch.layout.entries == entries
    assert all(start % 16 == 0 for start, _, _ in batch.layout.fields.values())
    assert repr(batch) == "PackedBatch(4 x 5 tokens on cpu)"


def test_reads_like_a_dictionary(cache: Cache) -> None:
    batch = first_batch(cache)
    assert list(batch) == ["input_ids", "labels", "targets"]
    assert len(batch) == 3
    assert "labels" in batch
    assert "attention_mask" not in batch
    with pytest.raises(KeyError, match="attention_mask"):
        batch["attention_mask"]
    assert batch.unpack().keys() == batch.keys()


def test_half_precision_weights_arrive_as_float32(cache: Cache) -> None:
    full, half = first_batch(cache), first_batch(cache, weights="float16")
    assert half.buffer.numel() < full.buffer.numel()
    assert half.targets.weights.dtype == torch.float32
    assert torch.equal(half.targets.weights, full.targets.weights.half().float())
    assert torch.equal(half.targets.ids, full.targets.ids)


@pytest.mark.parametrize("entries", [[3, 0, 5, 1], [2, 2, 2], [0, 0, 4], [4, 0, 0], [1]])
def test_the_way_of_gpus_gives_what_the_way_of_cpus_gives(entries: list[int]) -> None:
    offsets = torch.tensor([0, *np.cumsum(entries)], dtype=torch.int32)
    ids = torch.arange(100, 100 + sum(entries), dtype=torch.int32)
    weights = torch.rand(sum(entries), generator=torch.Generator().manual_seed(0)).half()
    one = _spread_by_mask(offsets, ids, weights, max(entries))
    other = _spread_by_index(offsets, ids, weights, max(entries))
    for mine, theirs in zip(one, other, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    assert one[0][0].tolist() == [*range(100, 100 + entries[0]), *[-1] * (max(entries) - entries[0])]


def test_rows_of_one_length_and_rows_without_entries(tmp_path: Path) -> None:
    """Blocks of a cache whose rows all have one id, and a batch of which no row has any."""
    batch = first_batch(random_cache(tmp_path / "cache"))
    for entries, equal in (([2] * 20, True), ([0] * 20, False)):
        offsets = np.concatenate([[0], np.cumsum(entries)]).astype(np.int32)
        layout = replace(batch.layout, entries=sum(entries), longest=max(1, *entries), equal=equal)
        made = PackedBatch(torch.zeros(layout.num_bytes, dtype=torch.uint8), layout, True, False)
        made._field("offsets").copy_(torch.from_numpy(offsets))
        made._field("ids").copy_(torch.arange(sum(entries)))
        ids = made.targets.ids
        assert ids.shape == (20, max(1, *entries))
        assert ids.flatten().tolist() == (list(range(40)) if equal else [-1] * 20)


def test_copies_and_pickles(cache: Cache) -> None:
    batch = first_batch(cache)
    assert_same(pickle.loads(pickle.dumps(batch)), batch)
    moved = batch.to("cpu", non_blocking=True)
    assert moved.samples_seen == batch.samples_seen
    assert_same(moved, batch)
    # On one device nothing is copied.
    assert moved.buffer.data_ptr() == batch.buffer.data_ptr()


def test_on_a_device_without_data(cache: Cache) -> None:
    """The meta device refuses whatever asks for values: unpacking on a GPU waits for nothing."""
    batch = first_batch(cache)
    on_meta = batch.to("meta").unpack()
    plain = batch.unpack()
    for name in ("input_ids", "labels"):
        assert on_meta[name].shape == plain[name].shape
    for name, value in plain["targets"].items():
        assert on_meta["targets"][name].shape == value.shape
        assert on_meta["targets"][name].dtype == value.dtype
        assert on_meta["targets"][name].device.type == "meta"


def test_through_the_shared_memory_of_a_worker(cache: Cache) -> None:
    (one,) = DataLoader(reader(cache, 1), batch_size=None, num_workers=1)
    assert isinstance(one, PackedBatch)
    assert_same(one, first_batch(cache))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(cache: Cache) -> None:
    expected = first_batch(cache)
    batch = first_batch(cache, pin_memory=True)
    assert batch.buffer.is_pinned()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = batch.to("cuda", non_blocking=True).unpack()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there["labels"].cpu(), expected["labels"])
    for name, value in there["targets"].items():
        np.testing.assert_array_equal(value.cpu(), expected["targets"][name])


def test_the_loss_takes_it(cache: Cache) -> None:
    batch = first_batch(cache)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((4 * cache.block_length, 8), generator=generator)
    head = torch.randn((cache.vocab_size, 8), generator=generator)
    loss = distillation_loss(hidden, head, batch.labels.flatten(), batch.targets)
    assert torch.isfinite(loss)
