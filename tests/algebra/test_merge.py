"""Units of one plan put together, and caches of several corpora one after another."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest

from logitcache.algebra import BlockRanges, Derivation, derive_cache, merge_caches, subset_cache
from logitcache.errors import CacheError, DamagedCacheError, PlanMismatchError, UsageError
from logitcache.reader import CacheDataset, ReaderOptions
from logitcache.selection import Selection
from logitcache.store import Cache, open_cache, verify
from tests.algebra.caches import CODE, PROSE, check_blocks, everything, reopened, two_corpora, workers
from tests.caches import Dumped, random_cache
from tests.faults import flip_bit
from tests.store.caches import commit, content, files_of, identity, make_cache, rewrite

# ------------------------------------------------------------------------------------------ units of one plan


@pytest.mark.parametrize("kind", ["counts", "logprob"])
def test_units_of_several_workers(tmp_path: Path, kind: str) -> None:
    """The result is the cache that one run would have written, byte for byte, without copying where links can do."""
    whole = make_cache(tmp_path / "whole", kind)
    folders = workers(tmp_path, [[2], [0], [1]], kind)
    result = merge_caches(folders, tmp_path / "new")
    assert files_of(tmp_path / "new") == files_of(whole.root)
    assert result.manifest == open_cache(whole.root).manifest
    assert result.notes == {"conflicting_units": [], "missing_units": []}
    whole.check(everything(reopened(tmp_path / "new")), 0, 21)
    shard = next((tmp_path / "new" / "shards").glob("000002-*"))
    assert shard.samefile(next((folders[0] / "shards").iterdir()))


def test_several_merges_at_once(tmp_path: Path) -> None:
    """Who finishes first takes the others' temporary files for leftovers; they find their work done."""
    whole = make_cache(tmp_path / "whole")
    fork = multiprocessing.get_context("fork")
    for number in range(4):
        root = tmp_path / str(number)
        children = [fork.Process(target=merge_caches, args=([whole.root], root)) for _ in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 4
        assert files_of(root) == files_of(whole.root)


def test_units_that_come_later(tmp_path: Path) -> None:
    folders = workers(tmp_path, [[2], [0, 2], [1]])
    first = merge_caches(folders[:2], tmp_path / "new")
    assert first.manifest is None
    assert first.notes["missing_units"] == [1]
    with pytest.raises(CacheError, match="is unfinished"):
        open_cache(tmp_path / "new")
    assert open_cache(tmp_path / "new", partial=True).num_tokens == first.tokens
    assert merge_caches(folders[:2], tmp_path / "new").computed_tokens == 0
    assert merge_caches([folders[2]], tmp_path / "new").manifest is not None
    assert files_of(tmp_path / "new") == files_of(make_cache(tmp_path / "whole").root)


def test_dump_finishes_what_merge_left(tmp_path: Path) -> None:
    """An unfinished merged cache is an unfinished cache of that plan."""
    merge_caches(workers(tmp_path, [[2], [0]]), tmp_path / "new")
    whole = make_cache(tmp_path / "whole")
    make_cache(tmp_path / "new")
    assert files_of(tmp_path / "new") == files_of(whole.root)


def test_copies_where_links_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    link = os.link

    def fail_across(source: Path, target: Path) -> None:
        if ".tmp" in str(target):
            raise OSError(18, "Invalid cross-device link")
        link(source, target)

    folders = workers(tmp_path, [[2], [0, 1]])
    monkeypatch.setattr(os, "link", fail_across)
    merge_caches(folders, tmp_path / "new")
    assert files_of(tmp_path / "new") == files_of(make_cache(tmp_path / "whole").root)
    for shard in (tmp_path / "new" / "shards").iterdir():
        assert shard.stat().st_nlink == 1


def test_of_different_contents_the_first_is_taken(tmp_path: Path) -> None:
    folders = workers(tmp_path, [[0, 1, 2], [0]])
    tokens, targets = content(seed=5)
    from logitcache.store import CacheWriter

    commit(CacheWriter.open(folders[1], identity()), 1, tokens, targets)
    result = merge_caches([folders[1], folders[0]], tmp_path / "new")
    assert result.notes["conflicting_units"] == [1]
    cache = reopened(tmp_path / "new")
    blocks = cache.read_blocks(8, 16)
    np.testing.assert_array_equal(blocks.tokens.ravel(), tokens[40:80])
    assert merge_caches([folders[0], folders[1]], tmp_path / "new").notes["conflicting_units"] == [1]
    assert open_cache(tmp_path / "new").fingerprint == cache.fingerprint
    merge_caches([folders[0], folders[1]], tmp_path / "other")
    assert files_of(tmp_path / "other") == files_of(make_cache(tmp_path / "whole").root)


def test_damaged_units_are_not_taken_over(tmp_path: Path) -> None:
    folders = workers(tmp_path, [[2], [0, 1]])
    shard = next((folders[0] / "shards").iterdir())
    flip_bit(shard, 4000)
    with pytest.raises(DamagedCacheError, match=rf"^{shard} is damaged: its SHA-256 differs"):
        merge_caches(folders, tmp_path / "new")
    assert not list(tmp_path.glob("new/**/*.tmp"))
    shard.unlink()
    with pytest.raises(DamagedCacheError, match=rf"^{shard} is missing"):
        merge_caches(folders, tmp_path / "new")
    assert not (tmp_path / "new" / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["counts", "logprob"])
def test_runs_begun_apart(tmp_path: Path, kind: str) -> None:
    """Each has tables of its own: the other's units are packed anew, and every row stays as it is."""
    whole = make_cache(tmp_path / "whole", kind)
    make_cache(tmp_path / "a", kind, units=range(1))
    make_cache(tmp_path / "b", kind, units=range(1, 3))
    tables = [open_cache(tmp_path / name, partial=True).manifest.codebook_sha256 for name in "ab"]
    assert tables[0] != tables[1]
    result = merge_caches([tmp_path / "b", tmp_path / "a"], tmp_path / "new")
    assert result.notes == {"conflicting_units": [], "missing_units": []}
    cache = reopened(tmp_path / "new")
    assert cache.manifest.codebook_sha256 == tables[1]
    whole.check(everything(cache), 0, 21)


def test_another_plan_in_the_folder(tmp_path: Path) -> None:
    folders = workers(tmp_path, [[2], [0, 1]])
    make_cache(tmp_path / "new", seed=3)
    with pytest.raises(PlanMismatchError, match="seed: the cache has 3, this run 0"):
        merge_caches(folders, tmp_path / "new")


# ------------------------------------------------------------------------------------------ several corpora


@pytest.mark.parametrize("kind", ["counts", "logprob"])
def test_two_corpora_one_after_another(tmp_path: Path, kind: str) -> None:
    """Every block of both, in order, the padded one in the middle too."""
    prose, code = two_corpora(tmp_path, kind)
    result = merge_caches([prose.root, code.root], tmp_path / "new")
    cache = reopened(tmp_path / "new")
    assert result.tokens == cache.num_tokens == 150
    geometry = cache.manifest.identity.geometry
    assert geometry.short_blocks == [[20, 3]]
    assert (geometry.chunk_blocks, geometry.unit_blocks) == (3, 6)
    check_blocks(cache, [*((prose, block) for block in range(21)), *((code, block) for block in range(10))])
    step = cache.manifest.identity.ancestry[-1]
    assert (step.operation, step.arguments) == ("merge", {"blocks": [21, 10]})
    assert step.parents == [prose.fingerprint, code.fingerprint]
    assert cache.manifest.identity.corpus["merged"] == [prose.manifest.identity.corpus, code.manifest.identity.corpus]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    """Two corpora, and a third; read only."""
    root = tmp_path_factory.mktemp("corpora")
    return [*two_corpora(root), random_cache(root / "third", "counts", 3, CODE)]


def test_merged_twice_and_three_of_them(corpora: list[Cache], tmp_path: Path) -> None:
    """A merged cache is a cache; steps that its parents share are listed once."""
    prose, code, third = corpora
    merge_caches([prose.root, code.root], tmp_path / "two")
    merge_caches([tmp_path / "two", third.root], tmp_path / "three")
    merge_caches([prose.root, code.root, third.root], tmp_path / "flat")
    nested, flat = reopened(tmp_path / "three"), reopened(tmp_path / "flat")
    check_blocks(nested, [(flat, block) for block in range(41)])
    assert nested.manifest.identity.geometry.short_blocks == [[20, 3], [30, 2]]
    assert [step.operation for step in nested.manifest.identity.ancestry] == ["merge", "merge"]
    assert len(flat.manifest.identity.ancestry) == 1


def labels_of(cache: Cache) -> list[tuple[int, int]]:
    """Every (token, next token) of a cache."""
    blocks = everything(cache)
    labels = blocks.labels()
    return sorted(zip(blocks.tokens[labels >= 0].tolist(), labels[labels >= 0].tolist(), strict=True))


def test_no_padding_is_trained_on(corpora: list[Cache], tmp_path: Path) -> None:
    """One epoch of the reader: the labelled positions of both corpora, each once, and rows only where tokens are."""
    prose, code = corpora[:2]
    merge_caches([prose.root, code.root], tmp_path / "new")
    cache = open_cache(tmp_path / "new")
    seen = []
    for batch in CacheDataset(cache, ReaderOptions(batch_blocks=1), num_batches=31):
        tokens, labels = batch["input_ids"].ravel(), batch["labels"].ravel()
        counted = labels >= 0
        seen += list(zip(tokens[counted].tolist(), labels[counted].tolist(), strict=True))
        assert (batch["targets"]["weights"].sum(1)[counted] > 0).all()
    assert sorted(seen) == sorted(labels_of(prose) + labels_of(code))
    assert len(seen) == 150 - 31


def test_blocks_are_not_taken_twice(tmp_path: Path) -> None:
    """A cache and what was made of it hold the same blocks; chosen blocks of one cache do not."""
    prose, code = two_corpora(tmp_path)
    merge_caches([prose.root, code.root], tmp_path / "both")
    with pytest.raises(UsageError, match=r"both was made of .*prose and holds its blocks already; leave one out$"):
        merge_caches([tmp_path / "both", prose.root], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    for name, blocks in (("first", "0:9"), ("second", "9:")):
        subset_cache(prose.root, tmp_path / name, BlockRanges.parse(blocks))
    merge_caches([tmp_path / "first", tmp_path / "second"], tmp_path / "again")
    check_blocks(reopened(tmp_path / "again"), [(prose, number) for number in range(21)])


def test_a_cache_inside_a_cache_is_refused(tmp_path: Path) -> None:
    prose, code = two_corpora(tmp_path)
    with pytest.raises(UsageError, match=r"lies inside the cache .*prose; choose another folder for --out$"):
        merge_caches([prose.root, code.root], prose.root / "sub" / "new")
    (tmp_path / "link").symlink_to(prose.root)
    with pytest.raises(UsageError, match=r"lies inside the cache .*prose; choose another folder for --out$"):
        subset_cache(code.root, tmp_path / "link" / "new", BlockRanges.parse("0"))
    subset_cache(code.root, prose.root / ".." / "beside", BlockRanges.parse("0"))
    assert verify(tmp_path / "beside").ok
    assert verify(prose.root).ok


def test_what_differs_is_listed(tmp_path: Path) -> None:
    one = random_cache(tmp_path / "one", "counts", 1, PROSE)
    other = random_cache(tmp_path / "other", "logprob", 1, PROSE.model_copy(update={"block_length": 7}))
    with pytest.raises(CacheError) as caught:
        merge_caches([one.root, other.root], tmp_path / "new")
    assert str(caught.value) == (
        f"{one.root} and {other.root} cannot be merged: their rows differ in meaning. The difference:"
        "\n  block_length: 5 and 7\n  selection.method: 'sample' and 'top-k'"
    )
    assert not (tmp_path / "new").exists()


def test_draws_from_stored_ids_are_another_thing(dumped: Dumped, tmp_path: Path) -> None:
    """The same selection and teacher, but the tail was left out of one."""
    derive_cache(dumped.top_k, tmp_path / "drawn", Derivation(Selection.parse("sample:20"), max_tail_mass=1.0))
    with pytest.raises(CacheError, match=r"differ in meaning. The difference:\n  tail_left_out: False and True$"):
        merge_caches([dumped.sample, tmp_path / "drawn"], tmp_path / "new")


def test_unfinished_caches_of_different_plans(tmp_path: Path) -> None:
    prose = random_cache(tmp_path / "prose", "counts", 1, PROSE)
    make_cache(tmp_path / "half", units=range(2))
    with pytest.raises(CacheError, match=r"half is unfinished, and only unfinished caches of one plan can be merged"):
        merge_caches([prose.root, tmp_path / "half"], tmp_path / "new")


def test_one_cache_given_twice(corpora: list[Cache], tmp_path: Path) -> None:
    prose, code = corpora[:2]
    shutil.copytree(prose.root, tmp_path / "copy")
    for sources in ([prose.root, code.root, prose.root / "../prose"], [prose.root, code.root, tmp_path / "copy"]):
        with pytest.raises(UsageError, match=r"are the same cache; give it once$"):
            merge_caches(sources, tmp_path / "new")
    with pytest.raises(UsageError, match="code is the cache to read from"):
        merge_caches([prose.root, code.root], code.root)
    with pytest.raises(UsageError, match="there is nothing to merge"):
        merge_caches([], tmp_path / "new")


def test_other_sources_on_the_same_folder(corpora: list[Cache], tmp_path: Path) -> None:
    prose, code, third = corpora
    merge_caches([prose.root, code.root], tmp_path / "new")
    with pytest.raises(PlanMismatchError, match=r"\n  CACHE \(ancestry\.0\.parents\): the cache has .*\]$"):
        merge_caches([prose.root, third.root], tmp_path / "new")


def test_a_damaged_source_stops_the_merge(tmp_path: Path) -> None:
    prose, code = two_corpora(tmp_path)
    shard = next((code.root / "shards").glob("000001-*"))
    whole = shard.read_bytes()
    flip_bit(shard, 3000)
    with pytest.raises(DamagedCacheError, match=rf"^{shard} is damaged"):
        merge_caches([prose.root, code.root], tmp_path / "new")
    assert not (tmp_path / "new" / "manifest.json").exists()
    shard.write_bytes(whole)
    merge_caches([prose.root, code.root], tmp_path / "new")
    merge_caches([prose.root, code.root], tmp_path / "straight")
    assert files_of(tmp_path / "new") == files_of(tmp_path / "straight")


def test_a_merged_manifest_that_lies(corpora: list[Cache], tmp_path: Path) -> None:
    """Short blocks are part of the plan: moving one is found."""
    prose, code = corpora[:2]
    merge_caches([prose.root, code.root], tmp_path / "new")
    path = tmp_path / "new" / "manifest.json"
    fields = open_cache(tmp_path / "new").manifest.model_dump(mode="json")
    fields["identity"]["geometry"]["short_blocks"] = [[19, 3]]
    rewrite(path, identity=fields["identity"])
    assert not verify(tmp_path / "new").ok
