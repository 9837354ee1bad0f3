"""Several caches at once: teachers averaged on the same blocks, corpora mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.errors import DamagedCacheError, TrainingError
from logitcache.reader import AveragedCaches, CacheDataset, MixedCaches, ReaderOptions
from logitcache.reader.mix import Mix
from logitcache.reader.sources import average_rows, shares_of
from logitcache.store import Cache, CacheWriter, Geometry, open_cache
from logitcache.store.access import LocalFiles
from logitcache.store.layout import Layout
from logitcache.store.schema import Shard
from logitcache.targets import SparseTargets
from tests.caches import MANY_SHARDS, Dumped, random_cache
from tests.reader.batches import assert_same, block_tokens, reader, tokens_of
from tests.store.caches import commit, content, identity


def two_teachers(root: Path, kind: str, geometry: Geometry = MANY_SHARDS, tokens_of: int = 0) -> list[Cache]:
    """Two caches of random rows over the same tokens, in chunks of different sizes."""
    tokens, _ = content(kind, tokens_of, MANY_SHARDS)
    caches = []
    for seed, chunk_blocks in ((0, 2), (1, 5)):
        _, targets = content(kind, seed, MANY_SHARDS)
        made = identity(kind, seed, geometry.model_copy(update={"chunk_blocks": chunk_blocks}))
        writer = CacheWriter.open(root / str(seed), made)
        for unit in writer.pending_units():
            commit(writer, unit, tokens, targets)
        writer.finalize()
        caches.append(open_cache(root / str(seed)))
    return caches


def dense(targets: Any, rows: int, vocab_size: int) -> np.ndarray:
    """[rows, V] weights of padded targets."""
    ids, weights = np.asarray(targets.ids), np.asarray(targets.weights)
    out = np.zeros((rows, vocab_size + 1))
    np.put_along_axis(out, np.where(ids < 0, vocab_size, ids), weights, axis=1)
    return out[:, :vocab_size]


# ------------------------------------------------------------------------------------------------ averages


@pytest.mark.parametrize("kind", ["counts", "logprob"])
def test_an_average_is_the_mean_of_every_probability(kind: str, tmp_path: Path) -> None:
    teachers = two_teachers(tmp_path, kind)
    weights = [1.0, 3.0]
    dataset = reader(AveragedCaches(teachers, weights), 13)
    for number, batch in enumerate(dataset):
        for row, block in enumerate(dataset.order.samples(4 * number, 4).tolist()):
            of_teachers = [cache.read_blocks(block, block + 1) for cache in teachers]
            rows = slice(row * 5, row * 5 + 5)
            mean = sum(
                share * dense(blocks.targets.to_device(), 5, 400)
                for share, blocks in zip((0.25, 0.75), of_teachers, strict=True)
            )
            np.testing.assert_allclose(dense(batch.targets, 20, 400)[rows], mean, atol=1e-7)
            real = of_teachers[0].valid[0]
            tails = 0.25 * of_teachers[0].targets.tail_mass + 0.75 * of_teachers[1].targets.tail_mass
            np.testing.assert_allclose(batch.targets.tail_mass[rows][real], tails[real], atol=1e-6)
    assert batch.targets.unbiased == (kind == "counts")
    assert batch.targets.has_exact_head == (kind == "logprob")
    thresholds = batch.targets.threshold
    assert (thresholds == (np.inf if kind == "counts" else 0)).all()


def test_columns_of_an_average() -> None:
    one = SparseTargets([0, 1, 2], [3, 3], [0.5, 0.25], label_logprob=np.log([0.5, 0.1]), entropy=[1, 2])
    other = SparseTargets([0, 2, 2], [1, 3], [0.25, 0.5], label_logprob=[-np.inf, np.nan], entropy=[3, np.nan])
    mean = average_rows([one, other], [0.5, 0.5])
    assert mean.offsets.tolist() == [0, 2, 3]
    assert mean.ids.tolist() == [1, 3, 3]
    np.testing.assert_allclose(mean.weights, [0.125, 0.5, 0.125])
    np.testing.assert_allclose(mean.tail_mass, [0.375, 0.875])
    np.testing.assert_allclose(np.exp(mean.label_logprob), [0.25, np.nan])
    np.testing.assert_allclose(mean.entropy, [2, np.nan])


def test_the_average_of_one_cache_is_that_cache(tmp_path: Path) -> None:
    cache = random_cache(tmp_path / "cache")
    (one,), (other,) = reader(AveragedCaches([cache]), 1), reader(cache, 1)
    assert_same(one, other)
    assert one.layout == other.layout


def test_the_average_of_a_teacher_with_itself(dumped: Dumped) -> None:
    """A top-k:8 cache and one of all ids: the union is all ids, and a stored probability stays what it was."""
    caches = [open_cache(dumped.top_k), open_cache(dumped.dense)]
    (batch,) = reader(AveragedCaches(caches), 1, shuffle=False)
    (alone,) = reader(caches[1], 1, shuffle=False)
    size = 4 * caches[0].block_length
    mean, whole = dense(batch.targets, size, 300), dense(alone.targets, size, 300)
    top = np.argsort(-whole, axis=1)[:, :4]
    np.testing.assert_allclose(np.take_along_axis(mean, top, axis=1), np.take_along_axis(whole, top, axis=1), rtol=0.02)


def test_teachers_of_other_blocks_are_refused(tmp_path: Path, dumped: Dumped) -> None:
    counts, logprob = random_cache(tmp_path / "counts"), random_cache(tmp_path / "logprob", "logprob")
    with pytest.raises(TrainingError, match="cannot be averaged: unbiased is True and False; dump both teachers"):
        AveragedCaches([counts, logprob])
    shorter = random_cache(tmp_path / "shorter", geometry=MANY_SHARDS.model_copy(update={"num_tokens": 240}))
    with pytest.raises(TrainingError, match="number of tokens is 247 and 240"):
        AveragedCaches([counts, shorter])
    with pytest.raises(TrainingError, match="tokenizer"):
        AveragedCaches([counts, open_cache(dumped.sample)])


def test_other_tokens_under_the_same_name_are_noticed(tmp_path: Path) -> None:
    """The facts agree, but not the blocks, as of two subsets of one corpus."""
    one, _ = two_teachers(tmp_path / "one", "counts")
    _, other = two_teachers(tmp_path / "other", "counts", tokens_of=1)
    with pytest.raises(DamagedCacheError, match="name the same corpus, but hold other tokens or masks in "):
        next(iter(reader(AveragedCaches([one, other]))))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, np.nan], [np.inf, 1.0], [1e308, 1e308]])
def test_weights_that_make_no_sense(weights: list[float]) -> None:
    with pytest.raises(TrainingError, match="positive share"):
        shares_of(2, weights)


# ---------------------------------------------------------------------------------------------------- mixes


@pytest.mark.parametrize(
    "weights", [[1.0], [0.5, 0.5], [0.7, 0.3], [0.9, 0.07, 0.03], [1 / 3] * 3, [0.001, 0.999], [0.123, 0.456, 0.421]]
)
def test_places_of_a_mix(weights: list[float]) -> None:
    """Every source gives its share at any time, its blocks in order, and any stretch is found without those before."""
    mix = Mix(shares_of(len(weights), weights))
    sources, places = mix.places(0, 3000)
    for source, weight in enumerate(weights):
        np.testing.assert_array_equal(places[sources == source], np.arange((sources == source).sum()))
        given = np.cumsum(sources == source)
        assert np.abs(given - weight * np.arange(1, 3001)).max() < 1
    for start, count in ((0, 0), (0, 1), (1, 9), (777, 3), (2000, 1000)):
        for whole, part in zip((sources, places), mix.places(start, count), strict=True):
            np.testing.assert_array_equal(part, whole[start : start + count])
    far = 10**12
    for one, other in zip(mix.places(far, 100), mix.places(far + 40, 60), strict=True):
        np.testing.assert_array_equal(one[40:], other)


def test_a_mix_reads_each_corpus_in_its_own_order(tmp_path: Path) -> None:
    caches = [random_cache(tmp_path / "one"), random_cache(tmp_path / "other", seed=1)]
    mixed = MixedCaches(caches, [3, 1], ranges=[(0, 50), (10, 22)])
    dataset = CacheDataset(mixed, ReaderOptions(4, seed=2), 40)
    rows = [row for batch in tokens_of(dataset) for row in batch]
    for cache, first, stop, count in ((caches[0], 0, 50, 120), (caches[1], 10, 22, 40)):
        alone = CacheDataset(cache, ReaderOptions(1, seed=2, first_block=first, stop_block=stop))
        there = block_tokens(cache, range(50))
        mine = [row for row in rows if row in there]
        assert mine == block_tokens(cache, alone.order.samples(0, count))


def test_a_mix_resumes_and_knows_its_weights(tmp_path: Path) -> None:
    caches = [random_cache(tmp_path / "one"), random_cache(tmp_path / "other", seed=1)]
    whole = tokens_of(reader(MixedCaches(caches, [2, 1]), 20))
    first = reader(MixedCaches(caches, [2, 1]), 7)
    begun = tokens_of(first)
    second = reader(MixedCaches(caches, [4, 2]), 13)
    second.load_state_dict(first.state_dict())
    assert begun + tokens_of(second) == whole
    for other in (MixedCaches(caches, [1, 1]), MixedCaches(caches[::-1], [2, 1])):
        with pytest.raises(TrainingError, match="resume from has"):
            reader(other).load_state_dict(first.state_dict())


def test_teachers_weights_are_part_of_the_state(tmp_path: Path) -> None:
    teachers = two_teachers(tmp_path, "counts")
    state = reader(AveragedCaches(teachers, [1, 2])).state_dict()
    reader(AveragedCaches(teachers, [1, 2])).load_state_dict(state)
    with pytest.raises(TrainingError, match="teachers"):
        reader(AveragedCaches(teachers, [2, 1])).load_state_dict(state)


def test_mixes_that_make_no_sense(tmp_path: Path) -> None:
    counts, logprob = random_cache(tmp_path / "counts"), random_cache(tmp_path / "logprob", "logprob")
    with pytest.raises(TrainingError, match="cannot be mixed: unbiased is True and False; dump both"):
        MixedCaches([counts, logprob], [1, 1])
    with pytest.raises(TrainingError, match="positive share"):
        MixedCaches([counts, counts], [1])
    with pytest.raises(TrainingError, match="2 caches are mixed, but 1 ranges"):
        MixedCaches([counts, counts], [1, 1], [(0, 5)])
    with pytest.raises(TrainingError, match="ranges="):
        reader(MixedCaches([counts, counts], [1, 1]), stop_block=5)
    with pytest.raises(TrainingError, match=r"blocks \[0, 51\) cannot be read"):
        reader(MixedCaches([counts, counts], [1, 1], [(0, 5), (0, 51)]))


# ------------------------------------------------------------------------------------------------ shards ahead


class NotedFiles(LocalFiles):
    """A folder's files that note which shards are wanted ahead."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(Layout(cache.root, cache.manifest.identity.container))
        self.wanted: set[str] = set()

    def prefetch(self, shards: Sequence[Shard]) -> None:
        self.wanted |= {shard.file for shard in shards}


@pytest.mark.parametrize("averaged", [False, True])
def test_shards_of_coming_windows_are_asked_for(averaged: bool, tmp_path: Path) -> None:
    files = [NotedFiles(cache) for cache in two_teachers(tmp_path, "counts")]
    caches = [Cache(each.root, open_cache(each.root).manifest, files=each) for each in files]
    dataset = CacheDataset(AveragedCaches(caches) if averaged else caches[0], ReaderOptions(4))
    next(iter(dataset))
    coming = {block for step in (1, 2) for block in dataset.order.window(step).blocks.tolist()}
    for each, cache in zip(files, caches, strict=True):
        needed = {cache.manifest.shards[cache.chunk_of(block).shard].file for block in coming}
        assert needed <= each.wanted if averaged or cache is caches[0] else not each.wanted
