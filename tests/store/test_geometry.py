"""Blocks, and the tokens in them, where blocks before the last one are short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from logitcache.errors import DamagedCacheError
from logitcache.store import CacheWriter, Geometry, open_cache, schema, verify
from logitcache.store.layout import Layout
from tests.codec.rows import assert_equal
from tests.store.caches import VOCABULARY, commit, content, identity, rewrite, stored

LENGTH = 5
counts_of_blocks = st.lists(st.integers(1, LENGTH), min_size=1, max_size=20)


@given(counts_of_blocks, st.integers(1, 4), st.integers(1, 9))
def test_geometry_of_any_blocks(counts: list[int], chunk_blocks: int, unit_blocks: int) -> None:
    geometry = Geometry.of_blocks(counts, LENGTH, chunk_blocks, unit_blocks)
    assert geometry.num_blocks == len(counts)
    assert geometry.num_tokens == sum(counts)
    assert geometry.unit_range(geometry.num_units - 1)[1] == len(counts)
    for first in range(len(counts)):
        for stop in range(first + 1, len(counts) + 1):
            assert geometry.tokens_in(first, stop) == sum(counts[first:stop])
            assert geometry.block_tokens(first, stop) == counts[first:stop]
    places = [(block, place) for block, count in enumerate(counts) for place in range(count)]
    assert [geometry.locate(position) for position in range(sum(counts))] == places


@given(st.integers(1, 1 << 34), st.integers(2, 1 << 17), st.lists(st.integers(1, 65_535), min_size=2, max_size=2))
def test_planned_geometries_of_one_corpus_fit_together(num_tokens: int, length: int, sizes: list[int]) -> None:
    """Equal units, chunks that divide each other, none that holds more than a chunk should."""
    one, two = sorted((Geometry.planned(num_tokens, length, size) for size in sizes), key=lambda it: it.chunk_blocks)
    assert one.unit_blocks == two.unit_blocks >= two.chunk_blocks
    assert two.chunk_blocks == two.unit_blocks or two.chunk_blocks % one.chunk_blocks == 0
    assert one.chunk_blocks * length <= schema.CHUNK_TOKENS or one.chunk_blocks == 1
    assert one.chunk_blocks * length * max(sizes) <= schema.CHUNK_ENTRIES or one.chunk_blocks == 1
    assert one.unit_blocks * length <= schema.MOST_UNIT_TOKENS or one.unit_blocks == 1


def test_a_geometry_without_short_blocks_is_as_before() -> None:
    assert Geometry.of_blocks([5, 5, 3], 5, 1, 2).short_blocks == []
    assert Geometry.of_blocks([5, 2, 3], 5, 1, 2).short_blocks == [[1, 2]]


@pytest.mark.parametrize(
    ("short", "what"),
    [
        ([[0, 5]], "must hold 1 to 4 tokens"),
        ([[0, 0]], "must hold 1 to 4 tokens"),
        ([[1, 2], [0, 2]], "ascending"),
        ([[1, 2], [1, 2]], "listed once each"),
        ([[3, 2]], "before the last block"),
        ([[0]], "at least 2 items"),
        ([[0, 1, 2]], "at most 2 items"),
        ([[-1, 2]], "greater than or equal to 0"),
    ],
)
def test_impossible_short_blocks(short: list[list[int]], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        Geometry(num_tokens=12, block_length=5, chunk_blocks=1, unit_blocks=1, short_blocks=short)


COUNTS = [5, 3, 5, 5, 1, 4, 5, 2, 5, 5, 4]


def make(root: Path, kind: str) -> tuple[Any, Any]:
    geometry = Geometry.of_blocks(COUNTS, LENGTH, 2, 4)
    tokens, targets = content(kind, 3, geometry)
    writer = CacheWriter.open(root, identity(kind, 3, geometry))
    for unit in writer.pending_units():
        first, stop = geometry.unit_range(unit)
        chunks = []
        for begin in range(first, stop, 2):
            low = sum(COUNTS[:begin])
            high = sum(COUNTS[: min(begin + 2, stop)])
            if writer.codebook() is None:
                writer.publish_pilot(tokens, targets)
            chunks.append(writer.encode(begin, tokens[low:high], targets.slice(low, high)))
        writer.commit_unit(unit, chunks)
    writer.finalize()
    return tokens, stored(writer, targets)


@pytest.mark.parametrize("kind", ["counts", "logprob"])
def test_a_cache_of_short_blocks_is_read_back(tmp_path: Path, kind: str) -> None:
    """Every token and row, none twice; nothing stands where a block has ended, and no label points there."""
    tokens, targets = make(tmp_path / "cache", kind)
    report = verify(tmp_path / "cache")
    assert report.ok
    assert report.tokens == sum(COUNTS)
    cache = open_cache(tmp_path / "cache")
    assert cache.num_tokens == sum(COUNTS)
    for start in range(len(COUNTS)):
        for stop in range(start + 1, len(COUNTS) + 1):
            blocks = cache.read_blocks(start, stop)
            low, high = sum(COUNTS[:start]), sum(COUNTS[:stop])
            assert blocks.valid.sum(1).tolist() == COUNTS[start:stop]
            np.testing.assert_array_equal(blocks.tokens[blocks.valid], tokens[low:high])
            assert (blocks.tokens[~blocks.valid] == 0).all()
            assert_equal(blocks.targets.take(np.flatnonzero(blocks.valid)), targets.slice(low, high))
            assert (blocks.targets.row_lengths[~blocks.valid.ravel()] == 0).all()
            labels = blocks.labels()
            assert ((labels >= 0).sum(1) == np.array(COUNTS[start:stop]) - 1).all()
            for row, count in enumerate(COUNTS[start:stop]):
                np.testing.assert_array_equal(labels[row, : count - 1], blocks.tokens[row, 1:count])


def test_short_blocks_that_the_content_contradicts(tmp_path: Path) -> None:
    """The same number of tokens, other places: the plan's fingerprint tells."""
    root = tmp_path / "cache"
    make(root, "counts")
    manifest = open_cache(root).manifest.model_dump(mode="json")
    manifest["identity"]["geometry"]["short_blocks"][0][0] = 2
    rewrite(Layout(root).manifest, identity=manifest["identity"])
    with pytest.raises(DamagedCacheError, match="its fingerprint is not that of its content"):
        open_cache(root)
    manifest["identity"]["geometry"]["short_blocks"][0] = [10, 3]
    rewrite(Layout(root).manifest, identity=manifest["identity"])
    with pytest.raises(DamagedCacheError, match=r"identity.geometry: .*before the last block"):
        open_cache(root)


def test_commit_helper_agrees(tmp_path: Path) -> None:
    """The helper of the other tests writes the same cache when no block is short."""
    geometry = Geometry.of_blocks([5, 5, 5, 2], LENGTH, 2, 4)
    tokens, targets = content("counts", 3, geometry)
    writer = CacheWriter.open(tmp_path / "cache", identity("counts", 3, geometry))
    commit(writer, 0, tokens, targets)
    assert writer.finalize().identity.vocab_size == VOCABULARY
    assert_equal(open_cache(tmp_path / "cache").read_blocks(0, 3).targets, stored(writer, targets).slice(0, 15))
