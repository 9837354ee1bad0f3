"""Decoding into memory that is used again gives what decoding into fresh arrays gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from logitcache.codec import (
    Arena,
    CountValues,
    HeadTailValues,
    LayoutName,
    ProbabilityValues,
    ReusedMemory,
    RowCodec,
    WeightValues,
)
from logitcache.codec.layouts import NARROW_VOCABULARY
from logitcache.errors import DamagedCacheError
from logitcache.targets import SparseTargets
from tests.codec.rows import COLUMNS, count_rows, probability_rows, varopt_rows
from tests.codec.test_rows import as_stored, book, tokens_for

VOCABULARY = 500
KINDS: dict[str, tuple[Any, Callable[..., SparseTargets]]] = {
    "counts": (CountValues(9), count_rows),
    "probabilities": (ProbabilityValues(), probability_rows),
    "weights": (WeightValues(), count_rows),
    "head-tail": (HeadTailValues(), varopt_rows),
}


@pytest.mark.parametrize("layout", ["fast", "small"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunk_after_chunk_in_the_same_memory(kind: str, layout: LayoutName) -> None:
    """Chunks of several sizes, so that arrays grow, shrink and hold what an earlier chunk left there."""
    values, make = KINDS[kind]
    codec, rng = RowCodec(layout, values), np.random.default_rng(0)
    memory = ReusedMemory(Arena(), Arena())
    for rows in (40, 3, 90, 0, 1, 60):
        targets = make(rng, rows, VOCABULARY, 9)
        tokens = tokens_for(targets, VOCABULARY)
        tables = book(tokens, targets, VOCABULARY)
        planes = as_stored(codec.encode(tokens, targets, tables, np.random.default_rng(1).random))
        before = {name: plane.copy() for name, plane in planes.items()}
        fresh = codec.decode(tokens, planes, tables)
        reused = codec.targets(codec.unpack(tokens, planes, tables, memory), memory)
        assert fresh.ids.dtype == np.int64
        assert reused.ids.dtype == np.int32
        for name in ("offsets", "ids", "weights", *COLUMNS):
            np.testing.assert_array_equal(getattr(reused, name), getattr(fresh, name), err_msg=name)
        for name, plane in planes.items():
            np.testing.assert_array_equal(plane, before[name])


def test_fresh_arrays_are_kept_for_ever() -> None:
    codec, rng = RowCodec("fast", CountValues(9)), np.random.default_rng(0)
    decoded, copies = [], []
    for _ in range(3):
        targets = count_rows(rng, 30, VOCABULARY, 9)
        tokens = tokens_for(targets, VOCABULARY)
        tables = book(tokens, targets, VOCABULARY)
        planes = as_stored(codec.encode(tokens, targets, tables, rng.random))
        decoded.append(codec.decode(tokens, planes, tables))
        copies.append((decoded[-1].ids.copy(), decoded[-1].weights.copy()))
    for targets, (ids, weights) in zip(decoded, copies, strict=True):
        np.testing.assert_array_equal(targets.ids, ids)
        np.testing.assert_array_equal(targets.weights, weights)


@pytest.mark.parametrize("draws", [2, 3, 7, 25, 50, 1000, 65_535])
def test_weights_of_counts_are_rounded_once(draws: int) -> None:
    """Divided in float32, they are still the float32 nearest to count / draws."""
    counts = np.arange(1, draws)
    counts = np.stack([counts, draws - counts], 1).ravel()
    decoded = CountValues(draws).decode((counts - 1).astype(np.uint16), {}, np.arange(0, counts.size + 1, 2))
    np.testing.assert_array_equal(decoded.weights, (counts / draws).astype(np.float32))


@pytest.mark.parametrize("vocab_size", [300, NARROW_VOCABULARY])
def test_running_sums_that_leave_the_vocabulary_are_refused_in_32_bits(vocab_size: int) -> None:
    """Steps of twice the vocabulary, the most a plane may hold, until 32 bits would have wrapped around into it."""
    codec = RowCodec("fast", CountValues(9))
    steps = 2**32 // (2 * vocab_size) + 2 if vocab_size > 300 else 5000
    row = np.full(min(steps, 5000), 2 * vocab_size, dtype=np.uint32)
    row[0] = 0
    empty = SparseTargets([0, 0], [], [], unbiased=True)
    tables = book(np.zeros(1, dtype=np.int64), empty, vocab_size)
    planes = {"ids": row, "counts": np.zeros(row.size, np.uint16), "lengths": np.array([row.size], np.uint16)}
    planes |= {name: np.zeros(1, np.uint16) for name in ("label_logprob", "entropy")}
    with pytest.raises(DamagedCacheError, match="outside the vocabulary"):
        codec.unpack(np.zeros(1, dtype=np.int64), planes, tables, ReusedMemory(Arena(), Arena()))


def test_an_arena_makes_room_when_more_is_asked_for() -> None:
    arena = Arena()
    first = arena.array("a", 10, np.int64)
    assert arena.array("a", 10, np.int64).base is first.base
    assert arena.array("a", 20, np.int32).size == 20
    held = arena.num_bytes
    assert arena.array("a", 1000, np.float64).dtype == np.float64
    assert arena.num_bytes >= 8000 > held
    assert arena.array("b", 3, np.uint16).base is not arena.array("a", 3, np.uint16).base
