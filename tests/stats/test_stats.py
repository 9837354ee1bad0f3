"""Every number of `stats` against plain numpy over all rows at once, and its pictures."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from logitcache.algebra import Derivation, derive_cache, merge_caches
from logitcache.errors import CacheError, DamagedCacheError, UsageError
from logitcache.selection import Selection
from logitcache.stats import CacheStats, StatsOptions, check_picture, draw_stats, left_out_panels, measure_stats
from logitcache.stats.columns import ByPosition
from logitcache.stats.tally import QUANTILES, Summary, Tally
from logitcache.store import Cache, CacheWriter, convert, open_cache
from tests.algebra.caches import two_corpora
from tests.caches import Dumped
from tests.faults import flip_bit
from tests.rollouts import LENGTH, SPECS, Rollouts

GOLDEN = Path(__file__).parent.parent / "golden" / "v1"


class Rows:
    """All real rows of some blocks, the plain way."""

    def __init__(self, cache: Cache, numbers: list[int] | None = None) -> None:
        chosen = range(cache.num_blocks) if numbers is None else numbers
        blocks = [cache.read_blocks(number, number + 1) for number in chosen]
        self.entries: list[dict[int, float]] = []
        self.place: list[int] = []
        self.label: list[int] = []
        columns: dict[str, list[float]] = {"tail_mass": [], "label_logprob": [], "entropy": [], "threshold": []}
        for block in blocks:
            mask = block.valid if block.counted is None else block.counted
            for place in np.flatnonzero(mask[0]):
                row = block.targets.slice(place, place + 1)
                self.entries.append(dict(zip(row.ids.tolist(), row.weights.tolist(), strict=True)))
                self.place.append(int(place))
                self.label.append(int(block.labels()[0, place]))
                for name, values in columns.items():
                    values.append(float(getattr(row, name)[0]))
        self.columns = {name: np.array(values) for name, values in columns.items()}
        self.ids = np.array([len(row) for row in self.entries])

    def kept(self) -> np.ndarray[Any, Any]:
        threshold = self.columns["threshold"]
        return np.array([sum(w for w in row.values() if w > threshold[n]) for n, row in enumerate(self.entries)])


def check_summary(found: Summary | None, values: np.ndarray[Any, Any], tolerance: float = 1e-9) -> None:
    known = values[~np.isnan(values)]
    if found is None:
        assert not known.size
        return
    assert found.count == known.size
    assert found.mean == pytest.approx(known.mean(), abs=1e-6)
    for name, share in QUANTILES.items():
        # Beyond 1000 nats nothing is told apart.
        expected = min(np.quantile(known, share, method="inverted_cdf"), 1000)
        assert getattr(found, name) == pytest.approx(expected, abs=tolerance), name
    assert (found.least, found.most) == (pytest.approx(known.min(), abs=1e-6), pytest.approx(known.max(), abs=1e-6))


def check(found: CacheStats, cache: Cache, rows: Rows) -> None:
    """All of it."""
    assert found.rows == len(rows.entries)
    assert cache.masked or found.tokens == found.rows
    check_summary(found.ids, rows.ids.astype(float) if cache.keeps_ids else np.zeros(0))
    check_summary(found.entropy, rows.columns["entropy"])
    check_summary(found.surprise, -rows.columns["label_logprob"])
    exact_head = cache.keeps_ids and cache.has_exact_head
    if exact_head:
        check_summary(found.kept_mass, rows.kept(), 2e-6)
    else:
        assert found.kept_mass is None
    surprise = -rows.columns["label_logprob"]
    if found.surprise is not None:
        assert found.cross_entropy == pytest.approx(np.nanmean(surprise))
        assert found.perplexity == pytest.approx(np.exp(np.nanmean(surprise)))
    labelled = [number for number, label in enumerate(rows.label) if label >= 0]
    assert found.labelled == len(labelled)
    hits = [rows.label[n] in rows.entries[n] for n in labelled]
    assert found.label_kept == (pytest.approx(np.mean(hits)) if cache.keeps_ids else None)
    used: dict[int, list[float]] = {}
    for row in rows.entries:
        for number, weight in row.items():
            used.setdefault(number, []).append(weight)
    assert found.distinct_ids == len(used)
    most = sorted(used, key=lambda number: (-len(used[number]), number))[:20]
    assert [one.id for one in found.top_ids] == most
    for one in found.top_ids:
        assert one.row_share == pytest.approx(len(used[one.id]) / found.rows)
        assert one.mean_weight == pytest.approx(sum(used[one.id]) / found.rows, rel=1e-5)
    place = np.array(rows.place)
    assert [one.first for one in found.places] == [0, *(one.stop for one in found.places[:-1])]
    assert found.places[-1].stop == cache.block_length
    for one in found.places:
        inside = (place >= one.first) & (place < one.stop)
        values = {"entropy": rows.columns["entropy"], "cross_entropy": surprise}
        if cache.keeps_ids:
            values["ids"] = rows.ids
        if exact_head:
            values["kept_mass"] = rows.kept()
        for name, column in values.items():
            expected = column[inside & ~np.isnan(column)]
            mean = getattr(one, name)
            assert (mean is None) == (not expected.size), (name, one)
            assert mean is None or mean == pytest.approx(expected.mean(), abs=1e-6)


@pytest.mark.parametrize("name", ["top_k", "sample", "varopt"])
def test_dumped_caches(name: str, dumped: Dumped) -> None:
    cache = open_cache(getattr(dumped, name))
    found = measure_stats(cache.root)
    check(found, cache, Rows(cache))
    assert (found.complete, found.cache_tokens, found.cache_chunks) == (True, cache.num_tokens, len(cache.chunks))
    assert found.array_bytes == cache.stored_bytes()
    assert found.shard_tokens == cache.num_tokens
    assert sum(found.array_bytes.values()) < cache.num_bytes


@pytest.mark.parametrize("root", sorted(path for path in GOLDEN.iterdir() if path.is_dir()), ids=lambda root: root.name)
def test_golden_caches(root: Path) -> None:
    """Every selection, layout and container; short rows, unknown and impossible labels."""
    cache = open_cache(root, partial=True)
    there = [block for ref in cache.chunks for block in blocks_of(ref)]
    check(measure_stats(root), cache, Rows(cache, there))


def test_short_blocks(tmp_path: Path) -> None:
    merge_caches([cache.root for cache in two_corpora(tmp_path, "logprob")], tmp_path / "both")
    cache = open_cache(tmp_path / "both")
    assert cache.manifest.identity.geometry.short_blocks
    check(measure_stats(cache.root), cache, Rows(cache))
    check(measure_stats(cache.root, StatsOptions(blocks="19:23,2")), cache, Rows(cache, [2, 19, 20, 21, 22]))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["masked", "whole"])
def test_rows_that_do_not_count_are_left_out(spec: str, kind: str, rollout_caches: Rollouts, tmp_path: Path) -> None:
    """And what a cache of labels does not have is not said of it."""
    cache = open_cache(getattr(rollout_caches, kind)[spec])
    found = measure_stats(cache.root)
    check(found, cache, Rows(cache))
    assert (found.tokens, found.rows) == (cache.num_tokens, cache.num_counted)
    chosen = [1, 2, 7, cache.num_blocks - 1]
    check(measure_stats(cache.root, StatsOptions(blocks=",".join(map(str, chosen)))), cache, Rows(cache, chosen))
    assert draw_stats(found, tmp_path / "all.png")


def test_blocks_of_which_nothing_counts(rollout_caches: Rollouts, tmp_path: Path) -> None:
    """As inside a long prompt."""
    found = measure_stats(rollout_caches.masked["top-k:7"], StatsOptions(blocks="0"))
    assert (found.tokens, found.rows, found.ids, found.kept_mass, found.surprise) == (LENGTH, 0, None, None, None)
    assert [path.name for path in draw_stats(found, tmp_path / "parts")] == ["bytes.png"]
    assert set(left_out_panels(found).values()) == {"no token is followed by one to learn"}
    assert draw_stats(found, tmp_path / "all.png")


def test_columns_that_are_not_there(dumped: Dumped, tmp_path: Path) -> None:
    derive_cache(dumped.sample, tmp_path / "bare", Derivation(None, ("entropy", "label_logprob")))
    cache = open_cache(tmp_path / "bare")
    found = measure_stats(cache.root)
    assert (found.entropy, found.surprise, found.cross_entropy, found.perplexity) == (None, None, None, None)
    check(found, cache, Rows(cache))


def test_chosen_blocks(dumped: Dumped) -> None:
    cache = open_cache(dumped.top_k)
    found = measure_stats(cache.root, StatsOptions(blocks="50:53,3,16:18"))
    check(found, cache, Rows(cache, [3, 16, 17, 50, 51, 52]))
    touched = sorted({cache.chunk_of(block).shard for block in (3, 16, 17, 50, 51, 52)})
    assert found.array_bytes == cache.stored_bytes(touched)
    assert found.shard_tokens == sum(cache.manifest.shards[number].num_tokens for number in touched)


def test_a_sample_of_chunks(dumped: Dumped, tmp_path: Path) -> None:
    cache = open_cache(dumped.top_k)
    whole = measure_stats(cache.root)
    assert asdict(measure_stats(cache.root, StatsOptions(sample=1000)).ids) == asdict(whole.ids)
    found = measure_stats(cache.root, StatsOptions(sample=2, seed=4))
    assert found.chunks == 2
    pairs = [",".join(str(b) for ref in pair for b in blocks_of(ref)) for pair in combinations(cache.chunks, 2)]
    chosen = [blocks for blocks in pairs if measure_stats(cache.root, StatsOptions(blocks=blocks)) == found]
    assert len(chosen) == 1, "it is the statistics of exactly two chunks"
    assert measure_stats(cache.root, StatsOptions(sample=2, seed=4)) == found
    others = {measure_stats(cache.root, StatsOptions(sample=2, seed=seed)).entropy for seed in range(4)}
    assert len(others) > 1


def blocks_of(ref: Any) -> list[int]:
    return list(range(ref.first_block, ref.first_block + ref.num_blocks))


def test_containers_agree(dumped: Dumped, tmp_path: Path) -> None:
    convert(dumped.varopt, tmp_path / "arrow", "arrow")
    near, far = measure_stats(dumped.varopt), measure_stats(tmp_path / "arrow")
    assert (near.entropy, near.kept_mass, near.top_ids, near.places) == (
        far.entropy, far.kept_mass, far.top_ids, far.places,
    )  # fmt: skip
    assert set(near.array_bytes) == set(far.array_bytes)
    assert far.array_bytes == open_cache(tmp_path / "arrow").stored_bytes()


def test_an_unfinished_cache(dumped: Dumped, tmp_path: Path) -> None:
    whole = open_cache(dumped.top_k)
    CacheWriter.open(tmp_path / "begun", whole.manifest.identity, whole.manifest.origin)
    with pytest.raises(CacheError, match="holds no rows yet; run the same dump again"):
        measure_stats(tmp_path / "begun")
    shutil.copytree(dumped.top_k, tmp_path / "half")
    (tmp_path / "half" / "manifest.json").unlink()
    for record in sorted((tmp_path / "half" / "commits").iterdir())[2:]:
        record.unlink()
    found = measure_stats(tmp_path / "half")
    assert not found.complete
    part = open_cache(tmp_path / "half", partial=True)
    check(found, part, Rows(part, list(range(part.num_tokens // part.block_length))))
    with pytest.raises(CacheError, match=r"block 100 of .* is not dumped yet"):
        measure_stats(tmp_path / "half", StatsOptions(blocks="100"))


def test_damage_is_said(dumped: Dumped, tmp_path: Path) -> None:
    shutil.copytree(dumped.top_k, tmp_path / "cache")
    shard = sorted((tmp_path / "cache" / "shards").iterdir())[3]
    flip_bit(shard, 4 * shard.stat().st_size)
    with pytest.raises(DamagedCacheError, match=f"{shard.name} is damaged: its SHA-256 differs"):
        measure_stats(tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sample": 0}, "look at 1 chunk at least"),
        ({"seed": -1}, "seed is -1"),
        ({"blocks": "5:"}, None),
        ({"blocks": "5:2"}, "are empty or outside the cache"),
        ({"blocks": "1,1"}, "more than once"),
        ({"blocks": "x"}, "is not understood"),
    ],
)
def test_options(options: dict[str, Any], says: str | None, dumped: Dumped) -> None:
    if says is None:
        assert measure_stats(dumped.top_k, StatsOptions(**options)).tokens > 0
        return
    with pytest.raises(UsageError, match=says):
        measure_stats(dumped.top_k, StatsOptions(**options))


# ------------------------------------------------------------------------------------------------------- counting


def test_a_tally_is_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = np.round(rng.exponential(2, 5000) * 64) / 64
    tally = Tally(1 / 64, 1000)
    for part in np.split(values, [1, 900, 900, 4000]):
        tally.add(np.append(part, np.nan))
    check_summary(tally.summary(), values)
    shares = tally.shares(8, 20)
    expected = np.bincount((values * 64).astype(int) // 8, minlength=20)[:20] / values.size
    np.testing.assert_allclose(shares, expected)
    assert Tally(1, 10).summary() is None


def test_a_tally_is_bounded() -> None:
    tally = Tally(1 / 64, 1000)
    tally.add(np.array([1e12, np.inf, 3.0]))
    assert tally.counts.size == 64_001
    assert (tally.most, tally.mean, tally.quantile(0.3)) == (np.inf, np.inf, 3.0)


@pytest.mark.parametrize("length", [2, 3, 32, 33, 1000])
def test_stretches_of_positions(length: int) -> None:
    places = ByPosition(length)
    places.add("place", np.arange(length), np.arange(length))
    expected = [np.arange(first, stop).mean() for first, stop in zip(places.firsts, places.stops, strict=True)]
    assert places.mean("place") == pytest.approx(expected)
    assert places.stops[-1] == length
    assert places.mean("nothing") == [None] * len(places.firsts)


# ------------------------------------------------------------------------------------------------------- pictures


NAMES = ["kept_mass", "entropy", "ids", "positions", "bytes", "used_ids"]
NO_COLUMNS = "neither entropy nor label_logprob is stored"
NOT_EXACT = "draws stand for the whole distribution, no weight is exact"
# What is left out of pictures of a cache, and why.
LEFT_OUT = {
    "top_k": {},
    "sample": {"kept_mass": NOT_EXACT},
    "bare": {"kept_mass": NOT_EXACT, "entropy": NO_COLUMNS, "positions": NO_COLUMNS},
    "label": dict.fromkeys(("kept_mass", "ids", "used_ids"), "no row has ids"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_pictures(name: str, dumped: Dumped, tmp_path: Path) -> None:
    """Of what there is; a picture of another cache does not stay among them."""
    root = tmp_path / name if name in ("bare", "label") else getattr(dumped, name)
    if name == "bare":
        derive_cache(dumped.sample, root, Derivation(None, ("entropy", "label_logprob")))
    if name == "label":
        derive_cache(dumped.sample, root, Derivation(Selection.parse("label")))
    found = measure_stats(root, token_text=lambda number: f"$_{number}\n")
    assert left_out_panels(found) == LEFT_OUT[name]
    (tmp_path / "parts").mkdir()
    for old in NAMES:
        (tmp_path / "parts" / f"{old}.png").write_text("of another cache")
    assert draw_stats(found, tmp_path / "new" / "all.png") == [tmp_path / "new" / "all.png"]
    parts = draw_stats(found, tmp_path / "parts")
    assert [path.stem for path in parts] == [panel for panel in NAMES if panel not in LEFT_OUT[name]]
    assert sorted((tmp_path / "parts").iterdir()) == sorted(parts)
    for path in (tmp_path / "new" / "all.png", *parts):
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 400
        assert len(np.unique(pixels[::9, ::9].reshape(-1, pixels.shape[-1]), axis=0)) > 10, "something is drawn"


def test_where_pictures_may_go(dumped: Dumped, tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    (tmp_path / "file").write_text("")
    for path, says in ((tmp_path / "a.png", "is a folder"), (tmp_path / "file", "is a file")):
        with pytest.raises(UsageError, match=says):
            check_picture(path)
    with pytest.raises(UsageError, match="lies inside the cache"):
        check_picture(dumped.top_k / "all.png")
    check_picture(tmp_path / "new" / "all.png")
    check_picture(tmp_path)
