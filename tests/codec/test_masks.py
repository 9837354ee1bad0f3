"""Masks: rows are stored where they count and come back there, and rows without ids are columns alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.codec import Arena, CodedRows, LayoutName, NoValues, ReusedMemory, RowCodec
from logitcache.errors import DamagedCacheError, FormatVersionError, TargetsError
from logitcache.targets import SparseTargets
from tests.codec.rows import assert_equal, generators, side_columns
from tests.codec.test_rows import MAKERS, as_stored, book, tokens_for, values_of

KINDS = [*MAKERS, "none"]
VOCABULARY = 300
many = settings(max_examples=60, deadline=None, derandomize=True)


def rows_of(kind: str, rng: np.random.Generator, count: int) -> SparseTargets:
    if kind in MAKERS:
        return MAKERS[kind](rng, count, VOCABULARY, 9)
    return SparseTargets(np.zeros(count + 1, dtype=np.int64), [], [], **side_columns(rng, count))


def codec_of(kind: str, layout: LayoutName, masked: bool) -> RowCodec:
    return RowCodec(layout, NoValues() if kind == "none" else values_of(kind), masked)


@many
@given(
    generators, st.sampled_from(KINDS), st.sampled_from(["small", "fast"]), st.integers(0, 25), st.floats(0, 1),
    st.booleans(),
)  # fmt: skip
def test_a_mask_and_its_rows_come_back(
    rng: np.random.Generator, kind: str, layout: LayoutName, count: int, share: float, reuse: bool
) -> None:
    """The rows that count are, bit for bit, what a cache of those rows alone gives back."""
    targets, counted = rows_of(kind, rng, count), rng.random(count) < share
    tokens = tokens_for(targets, VOCABULARY)
    tables = book(tokens, targets, VOCABULARY)
    codec, plain = codec_of(kind, layout, True), codec_of(kind, layout, False)
    planes = as_stored(codec.encode(tokens, targets, tables, np.random.default_rng(0).random, counted))
    assert "lengths" not in planes or planes["lengths"].size == counted.sum()
    memory = {"memory": ReusedMemory(Arena(), Arena())} if reuse else {}
    coded = codec.unpack(tokens, planes, tables, **memory)
    np.testing.assert_array_equal(coded.counted, counted)
    decoded = codec.targets(coded, **memory)
    alone = plain.targets(plain.code(targets.take(np.flatnonzero(counted)), np.random.default_rng(0).random))
    kept = decoded.take(np.flatnonzero(counted))
    assert_equal(SparseTargets(kept.offsets, kept.ids, kept.weights, unbiased=kept.unbiased, **columns(kept)), alone)
    others = decoded.take(np.flatnonzero(~counted))
    assert not others.row_lengths.any()
    assert np.isnan(others.label_logprob).all()
    assert np.isnan(others.entropy).all()
    assert (others.tail_mass == (0 if decoded.unbiased else 1)).all()


def columns(targets: SparseTargets) -> dict[str, Any]:
    return {name: getattr(targets, name) for name in ("tail_mass", "label_logprob", "entropy", "threshold")}


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_move_between_layouts_without_loss(kind: str) -> None:
    rng = np.random.default_rng(5)
    targets, counted = rows_of(kind, rng, 40), rng.random(40) < 0.6
    tokens = tokens_for(targets, VOCABULARY)
    tables = book(tokens, targets, VOCABULARY)
    small, fast = codec_of(kind, "small", True), codec_of(kind, "fast", True)
    coded = small.code(targets, np.random.default_rng(0).random, counted)
    moved = fast.unpack(tokens, fast.pack(tokens, coded, tables), tables)
    parts = [moved.slice(0, 13), moved.slice(13, 14), moved.slice(14, 40)]
    joined = CodedRows.concatenate(parts)
    np.testing.assert_array_equal(joined.counted, counted)
    assert_equal(small.targets(joined), small.targets(coded))


def test_what_a_mask_may_not_be() -> None:
    rng = np.random.default_rng(1)
    targets = rows_of("counts", rng, 6)
    tokens, counted = tokens_for(targets, VOCABULARY), np.arange(6) % 2 > 0
    tables = book(tokens, targets, VOCABULARY)
    masked, plain = codec_of("counts", "small", True), codec_of("counts", "small", False)
    with pytest.raises(TargetsError, match="needs a mask of the rows"):
        masked.code(targets, rng.random)
    with pytest.raises(TargetsError, match="has no place for a mask of the rows"):
        plain.code(targets, rng.random, counted)
    planes = masked.encode(tokens, targets, tables, rng.random, counted)
    for wrong in (np.arange(6), planes["counted"][:5], 1 - planes["counted"] * 0):
        with pytest.raises(DamagedCacheError):
            masked.decode(tokens, {**planes, "counted": wrong}, tables)
    with pytest.raises(DamagedCacheError, match="plane 'counted' is none of this codec"):
        plain.decode(tokens, planes, tables)
    planes.pop("counted")
    with pytest.raises(DamagedCacheError, match="there is no plane 'counted'"):
        masked.decode(tokens, planes, tables)


def test_rows_without_ids_hold_none() -> None:
    with pytest.raises(TargetsError, match="row 1 has ids, but only columns are stored"):
        codec_of("none", "small", False).code(SparseTargets([0, 0, 1], [4], [0.5]), np.random.default_rng(0).random)


@pytest.mark.parametrize("kind", KINDS)
def test_json_says_whether_there_is_a_mask(kind: str) -> None:
    masked, plain = codec_of(kind, "small", True), codec_of(kind, "small", False)
    assert masked.to_dict() == {**plain.to_dict(), "masked": True}
    assert RowCodec.from_dict(masked.to_dict()) == masked
    assert RowCodec.from_dict(plain.to_dict()) == plain
    for wrong in (False, 1, None, "yes"):
        with pytest.raises(FormatVersionError, match="is unknown to this version; upgrade logitcache"):
            RowCodec.from_dict({**plain.to_dict(), "masked": wrong})


def test_spread_needs_a_place_for_each_row() -> None:
    targets = SparseTargets([0, 1], [3], [0.5])
    with pytest.raises(TargetsError, match="1 rows cannot stand at 2 places"):
        targets.spread(np.array([True, False, True]))
