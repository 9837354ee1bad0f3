"""The reading order as a pure function of (fingerprint, seed, epoch)."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from logitcache.reader import BlockOrder
from logitcache.reader.order import CHUNKS_PER_WINDOW, SHARDS_PER_WINDOW
from logitcache.store import ChunkRef

FINGERPRINT = "f" * 64
# (seed, epoch) -> the order.
LITERAL = {
    (0, 0): [3, 9, 7, 12, 1, 4, 2, 11, 10, 6, 14, 8, 5, 13, 0],
    (0, 1): [12, 9, 5, 13, 7, 1, 3, 10, 4, 11, 0, 8, 2, 14, 6],
    (7, 0): [10, 12, 1, 13, 8, 11, 14, 5, 4, 0, 2, 6, 3, 9, 7],
    (1, 3): [17, 7, 15, 3, 6, 5, 13, 14, 8, 16, 12, 4, 9, 0, 10, 1, 2, 11],
}


def chunks_of(shards: int, chunks: int, blocks: int) -> list[ChunkRef]:
    """`shards` shards of `chunks` chunks of `blocks` blocks; every last chunk of a shard is one block shorter."""
    listed, first = [], 0
    for shard in range(shards):
        for chunk in range(chunks):
            size = blocks - (chunk == chunks - 1 and blocks > 1)
            listed.append(ChunkRef(shard, chunk, first, size))
            first += size
    return listed


def order_of(chunks: list[ChunkRef], seed: int = 0, fingerprint: str = FINGERPRINT) -> BlockOrder:
    return BlockOrder(fingerprint, chunks, 0, chunks[-1].first_block + chunks[-1].num_blocks, seed)


def test_literal_orders() -> None:
    """These numbers never change: a run begun with one version resumes with the next."""
    chunks = chunks_of(3, 2, 3)
    assert order_of(chunks).epoch(0).tolist() == LITERAL[0, 0]
    assert order_of(chunks).epoch(1).tolist() == LITERAL[0, 1]
    assert order_of(chunks, seed=7).epoch(0).tolist() == LITERAL[7, 0]


def test_literal_order_over_several_windows() -> None:
    """Six shards and twelve chunks: windows of four shards and of eight chunks."""
    assert SHARDS_PER_WINDOW == 4
    assert CHUNKS_PER_WINDOW == 8
    assert order_of(chunks_of(6, 2, 2), seed=1).epoch(3).tolist() == LITERAL[1, 3]


@pytest.mark.parametrize(("shards", "chunks", "blocks"), [(1, 1, 1), (1, 5, 2), (3, 4, 3), (9, 3, 4), (20, 1, 1)])
@pytest.mark.parametrize("epoch", [0, 5])
def test_every_block_once(shards: int, chunks: int, blocks: int, epoch: int) -> None:
    order = order_of(chunks_of(shards, chunks, blocks))
    assert sorted(order.epoch(epoch)) == list(range(order.num_blocks))


def test_seed_epoch_and_fingerprint_matter() -> None:
    chunks = chunks_of(5, 3, 4)
    base = order_of(chunks).epoch(0)
    for other in (
        order_of(chunks).epoch(1),
        order_of(chunks, seed=1).epoch(0),
        order_of(chunks, fingerprint="e" * 64).epoch(0),
    ):
        assert not np.array_equal(base, other)
    np.testing.assert_array_equal(base, order_of(chunks).epoch(0))


def test_blocks_are_mixed_across_chunks_and_shards() -> None:
    chunks = chunks_of(8, 4, 8)
    order = order_of(chunks).epoch(0)
    shard_of = {
        block: ref.shard for ref in chunks for block in range(ref.first_block, ref.first_block + ref.num_blocks)
    }
    assert len({shard_of[block] for block in order[:30].tolist()}) >= 3
    assert (np.diff(order) == 1).mean() < 0.1


def test_held_out_blocks_are_never_read() -> None:
    chunks = chunks_of(5, 3, 4)
    order = BlockOrder(FINGERPRINT, chunks, 7, 41, 3)
    assert order.num_blocks == 34
    for epoch in range(3):
        assert sorted(order.epoch(epoch)) == list(range(7, 41))
    whole = order_of(chunks, seed=3).epoch(2)
    np.testing.assert_array_equal(order.epoch(2), whole[(whole >= 7) & (whole < 41)])


def test_samples_are_slices_of_the_endless_sequence() -> None:
    order = order_of(chunks_of(3, 2, 3), seed=5)
    endless = np.concatenate([order.epoch(epoch) for epoch in range(5)])
    for start in (0, 1, order.num_blocks - 1, order.num_blocks, 2 * order.num_blocks - 3):
        for count in (0, 1, 4, 2 * order.num_blocks + 1):
            np.testing.assert_array_equal(order.samples(start, count), endless[start : start + count])


@pytest.mark.parametrize(("first", "stop"), [(0, 121), (13, 14), (30, 77)])
def test_windows_cover_the_endless_sequence(first: int, stop: int) -> None:
    """Each on its own, in any order; every chunk that is read stands in one window of an epoch."""
    chunks = chunks_of(11, 3, 4)
    order = BlockOrder(FINGERPRINT, chunks, first, stop, 3)
    endless = np.concatenate([order.epoch(epoch) for epoch in range(3)])
    again = BlockOrder(FINGERPRINT, chunks, first, stop, 3)
    for number in np.random.default_rng(0).permutation(3 * order.num_windows).tolist():
        window = again.window(number)
        np.testing.assert_array_equal(window.blocks, endless[window.start : window.stop])
        assert len(window.chunks) <= CHUNKS_PER_WINDOW
        of_chunks = {
            block for ref in window.chunks for block in range(ref.first_block, ref.first_block + ref.num_blocks)
        }
        assert set(window.blocks.tolist()) == {block for block in of_chunks if first <= block < stop}
    for place in range(3 * order.num_blocks):
        window = order.window(order.window_of(place))
        assert window.start <= place < window.stop
    for epoch in range(3):
        windows = [order.window(epoch * order.num_windows + index) for index in range(order.num_windows)]
        listed = [ref for window in windows for ref in window.chunks]
        wanted = [ref for ref in chunks if ref.first_block < stop and ref.first_block + ref.num_blocks > first]
        assert sorted(listed, key=lambda ref: ref.first_block) == wanted


def test_a_huge_cache_takes_no_more_than_its_windows() -> None:
    """67 million blocks: no array of all of them, half a gigabyte, is made to find four in the middle."""
    chunks = [ChunkRef(number // 64, number % 64, number << 14, 1 << 14) for number in range(4096)]
    order = BlockOrder(FINGERPRINT, chunks, 0, 1 << 26, 0)
    tracemalloc.start()
    try:
        order.samples(3 * (1 << 25) + 12345, 4)
        assert tracemalloc.get_traced_memory()[1] < 50 * CHUNKS_PER_WINDOW * (1 << 14)
    finally:
        tracemalloc.stop()


def test_blocks_as_they_are_stored() -> None:
    chunks = chunks_of(5, 3, 4)
    order = BlockOrder(FINGERPRINT, chunks, 2, 50, 7, shuffled=False)
    assert order.epoch(0).tolist() == order.epoch(4).tolist() == list(range(2, 50))
