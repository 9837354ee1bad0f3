"""Chosen blocks of a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.algebra import BlockRanges, Derivation, derive_cache, merge_caches, subset_cache
from logitcache.algebra.ranges import spell
from logitcache.codec import RowCodec
from logitcache.errors import PlanMismatchError, UsageError
from logitcache.selection import Selection, chunk_uniforms
from logitcache.store import CacheWriter, StoredSelection, convert, open_cache
from tests.algebra.caches import PROSE, check_blocks, everything, real_rows, reopened, two_corpora
from tests.caches import random_cache
from tests.codec.rows import assert_equal, varopt_rows, weight_rows
from tests.store.caches import commit, files_of, identity


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


def test_of_an_arrow_cache(tmp_path: Path) -> None:
    """The new cache has the container of the old one, and the rows of both are equal."""
    source = random_cache(tmp_path / "source", "logprob", 4, PROSE)
    convert(source.root, tmp_path / "arrow", "arrow")
    subset_cache(tmp_path / "arrow", tmp_path / "new", BlockRanges.parse("20,3:9"))
    cache = reopened(tmp_path / "new")
    assert cache.manifest.identity.container == "arrow"
    assert [step.operation for step in cache.manifest.identity.ancestry] == ["convert", "subset"]
    check_blocks(cache, [(source, number) for number in (20, *range(3, 9))])
    merge_caches([tmp_path / "new", source.root], tmp_path / "both")
    assert reopened(tmp_path / "both").manifest.identity.container == "arrow"


@pytest.mark.parametrize(("selection", "make"), [("varopt:9", varopt_rows), ("sample:9:0.8", weight_rows)])
def test_of_weights_that_are_rounded_at_random(tmp_path: Path, selection: str, make: Any) -> None:
    """A cache gives back what its codec makes of the rows, and what is made of the cache moves it unchanged."""
    chosen = Selection.parse(selection)
    codec = RowCodec.for_selection(chosen.method, chosen.size, chosen.exponent, "small").to_dict()
    changes = {"selection": StoredSelection(**chosen.to_dict()), "codec": codec}
    writer = CacheWriter.open(tmp_path / "source", identity("counts", 3, PROSE).model_copy(update=changes))
    rng = np.random.default_rng(3)
    targets, tokens = make(rng, PROSE.num_tokens, 400, 9), rng.integers(0, 400, PROSE.num_tokens)
    for unit in writer.pending_units():
        commit(writer, unit, tokens, targets)
    writer.finalize()
    source = open_cache(tmp_path / "source")
    for ref in source.chunks:
        rows = targets.slice(5 * ref.first_block, min(5 * (ref.first_block + ref.num_blocks), PROSE.num_tokens))
        coded = writer.codec.code(rows, chunk_uniforms(3, ref.first_block))
        assert_equal(real_rows(source.read_chunk(ref)), writer.codec.targets(coded))
    subset_cache(source.root, tmp_path / "part", BlockRanges.parse("20,0:9"))
    check_blocks(reopened(tmp_path / "part"), [(source, number) for number in (20, *range(9))])
    derive_cache(source.root, tmp_path / "fast", Derivation(codec="fast", drop=("entropy",)))
    np.testing.assert_array_equal(
        everything(reopened(tmp_path / "fast")).targets.weights, everything(source).targets.weights
    )


def test_refusals(tmp_path: Path) -> None:
    source = random_cache(tmp_path / "source", "counts", 4, PROSE)
    for blocks in ("0:22", "21", "3,3"):
        with pytest.raises(UsageError):
            subset_cache(source.root, tmp_path / "new", BlockRanges.parse(blocks))
    with pytest.raises(UsageError, match="source is the cache to read from"):
        subset_cache(source.root, source.root, BlockRanges.parse("3"))
    assert not (tmp_path / "new").exists()


def test_other_blocks_on_the_same_folder(tmp_path: Path) -> None:
    source = random_cache(tmp_path / "source", "counts", 4, PROSE)
    subset_cache(source.root, tmp_path / "new", BlockRanges.parse("3:9"))
    before = files_of(tmp_path / "new")
    with pytest.raises(PlanMismatchError, match=r"\n  --blocks: the cache has '3:9', this run '3:8'$"):
        subset_cache(source.root, tmp_path / "new", BlockRanges.parse("3:8"))
    # The same blocks, spelt otherwise.
    assert subset_cache(source.root, tmp_path / "new", BlockRanges.parse("3:5,5,6:9")).computed_tokens == 0
    assert files_of(tmp_path / "new") == before
