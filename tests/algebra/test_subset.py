"""Chosen blocks of a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from logitcache.algebra import BlockRanges, merge_caches, subset_cache
from logitcache.algebra.ranges import spell
from logitcache.errors import CacheError, PlanMismatchError, UsageError
from logitcache.store import open_cache
from tests.algebra.caches import PROSE, check_blocks, reopened, two_corpora
from tests.caches import random_cache
from tests.store.caches import files_of


@pytest.mark.parametrize(
    ("kind", "blocks", "numbers", "short"),
    [
        ("counts", "3:8,20,1", [3, 4, 5, 6, 7, 20, 1], [[5, 3]]),
        ("logprob", "20,0:20", [20, *range(20)], [[0, 3]]),
        ("counts", ":", list(range(21)), []),
        ("logprob", "7", [7], []),
    ],
)
def test_blocks_in_the_order_given(
    tmp_path: Path, kind: str, blocks: str, numbers: list[int], short: list[list[int]]
) -> None:
    source = random_cache(tmp_path / "source", kind, 4, PROSE)
    subset_cache(source.root, tmp_path / "new", BlockRanges.parse(blocks))
    cache = reopened(tmp_path / "new")
    check_blocks(cache, [(source, number) for number in numbers])
    assert cache.manifest.identity.geometry.short_blocks == short
    assert cache.manifest.identity.corpus == source.manifest.identity.corpus
    step = cache.manifest.identity.ancestry[-1]
    assert (step.operation, step.parents) == ("subset", [source.fingerprint])
    assert step.arguments == {"blocks": spell(np.array(numbers))}


def test_shuffled_blocks_of_a_merged_cache(tmp_path: Path) -> None:
    """Short blocks go where the list puts them; each chunk of the source is decoded once for a chunk of the new one."""
    prose, code = two_corpora(tmp_path)
    merge_caches([prose.root, code.root], tmp_path / "both")
    both = open_cache(tmp_path / "both")
    order = np.random.default_rng(3).permutation(31)
    subset_cache(both.root, tmp_path / "new", BlockRanges.parse(spell(order)))
    cache = reopened(tmp_path / "new")
    check_blocks(cache, [(both, int(number)) for number in order])
    assert cache.num_tokens == both.num_tokens


def test_a_long_list_is_recorded_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitcache.algebra.subset.LONGEST_SPELLING", 5)
    source = random_cache(tmp_path / "source", "counts", 4, PROSE)
    subset_cache(source.root, tmp_path / "new", BlockRanges.parse("0,2,4,6"))
    arguments = reopened(tmp_path / "new").manifest.identity.ancestry[-1].arguments
    assert arguments.keys() == {"num_blocks", "blocks_sha256"}
    with pytest.raises(PlanMismatchError, match=r"ancestry\.0\.arguments\.blocks_sha256"):
        subset_cache(source.root, tmp_path / "new", BlockRanges.parse("0,2,4,8"))


def test_refusals(tmp_path: Path) -> None:
    source = random_cache(tmp_path / "source", "counts", 4, PROSE)
    for blocks in ("0:22", "21", "3,3"):
        with pytest.raises(UsageError):
            subset_cache(source.root, tmp_path / "new", BlockRanges.parse(blocks))
    with pytest.raises(CacheError, match="source is the cache to read from"):
        subset_cache(source.root, source.root, BlockRanges.parse("3"))
    assert not (tmp_path / "new").exists()


def test_other_blocks_on_the_same_folder(tmp_path: Path) -> None:
    source = random_cache(tmp_path / "source", "counts", 4, PROSE)
    subset_cache(source.root, tmp_path / "new", BlockRanges.parse("3:9"))
    before = files_of(tmp_path / "new")
    with pytest.raises(PlanMismatchError, match=r"ancestry\.0\.arguments\.blocks: the cache has '3:9', this run '3:8'"):
        subset_cache(source.root, tmp_path / "new", BlockRanges.parse("3:8"))
    # The same blocks, spelt otherwise.
    assert subset_cache(source.root, tmp_path / "new", BlockRanges.parse("3:5,5,6:9")).computed_tokens == 0
    assert files_of(tmp_path / "new") == before
