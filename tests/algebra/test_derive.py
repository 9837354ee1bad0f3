"""Smaller caches from stored ones: content, ancestry, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from logitcache.algebra import Derivation, derive_cache
from logitcache.algebra.derive import _by_blocks, _stream_key, operation_for
from logitcache.algebra.rows import draw, keep_largest
from logitcache.codec import RowCodec
from logitcache.errors import CacheError, PlanMismatchError, UsageError
from logitcache.selection import Selection
from logitcache.store import Cache, Geometry, open_cache
from logitcache.targets import SparseTargets
from tests.algebra.caches import PROSE, check_blocks, everything, real_rows, reopened
from tests.caches import Dumped, random_cache
from tests.codec.rows import assert_equal
from tests.store.caches import files_of, make_cache


def derive(source: Path, root: Path, select: str | None = None, **more: object) -> None:
    derive_cache(source, root, Derivation(None if select is None else Selection.parse(select), **more))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def draws(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """`sample:9`; read only."""
    return random_cache(tmp_path_factory.mktemp("draws") / "source", "counts", 4, PROSE)


@pytest.fixture(scope="module")
def probabilities(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """`top-k:9`; read only."""
    return random_cache(tmp_path_factory.mktemp("probabilities") / "source", "logprob", 4, PROSE)


@pytest.mark.parametrize("select", ["top-k:4", "top-p:0.6:5", "top-p:1.0:9"])
def test_fewer_ids(probabilities: Cache, tmp_path: Path, select: str) -> None:
    """The same ids as selecting from the stored rows; weights are coded anew, to half a step of the codec's grid."""
    derive(probabilities.root, tmp_path / "new", select)
    cache = reopened(tmp_path / "new")
    old, new = everything(probabilities), everything(cache)
    wanted = Selection.parse(select)
    expected = keep_largest(real_rows(old), wanted.size, wanted.mass)
    rows = real_rows(new)
    np.testing.assert_array_equal(new.tokens, old.tokens)
    np.testing.assert_array_equal(new.valid, old.valid)
    np.testing.assert_array_equal(rows.offsets, expected.offsets)
    np.testing.assert_array_equal(rows.ids, expected.ids)
    np.testing.assert_allclose(rows.weights, expected.weights, rtol=0.12)
    np.testing.assert_allclose(
        rows.row_sums() + rows.tail_mass, np.where(rows.row_lengths, 1, rows.tail_mass), atol=1e-5
    )
    np.testing.assert_array_equal(rows.entropy, expected.entropy)
    np.testing.assert_array_equal(rows.label_logprob, expected.label_logprob)


def test_it_is_what_a_dump_would_have_kept(dumped: Dumped, tmp_path: Path) -> None:
    """top-k:8 of the teacher's whole rows against a dump of top-k:8: of ids stored as equal, either may be kept."""
    derive(dumped.dense, tmp_path / "new", "top-k:8")
    mine, theirs = everything(reopened(tmp_path / "new")), everything(open_cache(dumped.top_k))
    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
    stored = real_rows(everything(open_cache(dumped.dense))).weights.reshape(-1, 300)
    kept, dumped_ids = (real_rows(blocks).ids.reshape(-1, 8) for blocks in (mine, theirs))
    values = [np.sort(np.take_along_axis(stored, ids, axis=1)) for ids in (kept, dumped_ids)]
    np.testing.assert_array_equal(values[0], values[1])
    np.testing.assert_allclose(mine.targets.row_sums(), theirs.targets.row_sums(), atol=0.03)


def test_dropped_columns(draws: Cache, tmp_path: Path) -> None:
    derive(draws.root, tmp_path / "new", drop=("label_logprob", "entropy"))
    cache = reopened(tmp_path / "new")
    rows, old = real_rows(everything(cache)), real_rows(everything(draws))
    assert np.isnan(rows.label_logprob).all()
    assert np.isnan(rows.entropy).all()
    np.testing.assert_array_equal(rows.ids, old.ids)
    np.testing.assert_array_equal(rows.weights, old.weights)
    assert cache.manifest.identity.ancestry[-1].arguments == {"drop": ["entropy", "label_logprob"]}


@pytest.mark.parametrize("kind", ["counts", "logprob"])
def test_another_layout(draws: Cache, probabilities: Cache, tmp_path: Path, kind: str) -> None:
    """Rows are moved as they are coded: there and back gives equal rows, to the last bit."""
    source = draws if kind == "counts" else probabilities
    derive(source.root, tmp_path / "fast", codec="fast")
    derive(tmp_path / "fast", tmp_path / "small", codec="small", drop=("entropy",))
    fast, small = reopened(tmp_path / "fast"), reopened(tmp_path / "small")
    assert (fast.codec.layout, small.codec.layout) == ("fast", "small")
    check_blocks(fast, [(source, block) for block in range(21)])
    assert_equal(everything(fast).targets, everything(source).targets)
    for name in ("offsets", "ids", "weights", "tail_mass", "label_logprob", "threshold"):
        np.testing.assert_array_equal(
            getattr(everything(small).targets, name), getattr(everything(source).targets, name), err_msg=name
        )
    assert [step.arguments for step in small.manifest.identity.ancestry] == [
        {"codec": "fast"},
        {"codec": "small", "drop": ["entropy"]},
    ]
    with pytest.raises(UsageError, match="nothing of"):
        derive(fast.root, tmp_path / "new", codec="fast")


def test_fewer_draws(draws: Cache, tmp_path: Path) -> None:
    derive(draws.root, tmp_path / "new", "sample:4", seed=3)
    cache = reopened(tmp_path / "new")
    assert cache.unbiased
    assert cache.codec == RowCodec.for_selection("sample", 4, None, "small")
    old, new = real_rows(everything(draws)), real_rows(everything(cache))
    counts = {
        (row, entry): round(weight * 9)
        for row, entry, weight in zip(old.row_index().tolist(), old.ids.tolist(), old.weights.tolist(), strict=True)
    }
    for row, entry, weight in zip(new.row_index().tolist(), new.ids.tolist(), new.weights.tolist(), strict=True):
        assert 1 <= round(weight * 4) <= counts[row, entry]
    np.testing.assert_allclose(new.row_sums(), 1, atol=1e-6)
    # Another seed draws others; the same gives the same bytes.
    derive(draws.root, tmp_path / "other", "sample:4", seed=4)
    derive(draws.root, tmp_path / "again", "sample:4", seed=3)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "new")
    assert open_cache(tmp_path / "other").fingerprint != cache.fingerprint
    assert not np.array_equal(real_rows(everything(open_cache(tmp_path / "other"))).ids, new.ids)


def test_draws_from_stored_probabilities(dumped: Dumped, tmp_path: Path) -> None:
    """Over all rows, each id is drawn as often as its stored probabilities say, within 4 standard errors."""
    derive(dumped.dense, tmp_path / "new", "sample:30")
    stored, drawn = real_rows(everything(open_cache(dumped.dense))), real_rows(everything(reopened(tmp_path / "new")))
    weights = stored.weights / stored.row_sums()[stored.row_index()]
    expected = np.bincount(stored.ids, weights, minlength=300)
    deviation = np.sqrt(np.bincount(stored.ids, weights * (1 - weights) / 30, minlength=300))
    found = np.bincount(drawn.ids, drawn.weights, minlength=300)
    likely = expected > 0.5
    assert likely.sum() > 100
    assert (np.abs(found - expected)[likely] < 4 * deviation[likely]).all()
    np.testing.assert_array_equal(drawn.label_logprob, stored.label_logprob)


def test_streams_are_apart() -> None:
    """Of a cache and what is derived from it, and of two seeds: one stream twice would tie their draws together."""
    keys = {_stream_key(fingerprint, seed) for fingerprint in ("a" * 64, "b" * 64) for seed in (0, 1, 2**61)}
    assert len(keys) == 6
    assert all(2**64 < key < 2**128 for key in keys), "beyond the keys of a dump, which are seeds"


def test_draws_depend_on_the_place_alone(tmp_path: Path) -> None:
    """Grouped otherwise, the same blocks get the same draws; equal rows in different blocks do not."""
    targets = SparseTargets(np.arange(206 + 1) * 40, np.tile(np.arange(40), 206), np.full(206 * 40, 1 / 40))
    geometry = Geometry(num_tokens=206, block_length=10, chunk_blocks=4, unit_blocks=8)

    def drawn(first: int, stop: int) -> SparseTargets:
        rows = targets.slice(first * 10, first * 10 + geometry.tokens_in(first, stop))
        return _by_blocks(rows, geometry, (first, stop), None, 12, 77, draw)

    assert_equal(drawn(0, 21), SparseTargets.concatenate([drawn(0, 1), drawn(1, 13), drawn(13, 21)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("logitcache.algebra.derive.MOST_UNIFORMS", 1)
        one_by_one = drawn(0, 21)
    assert_equal(one_by_one, drawn(0, 21))
    texts = {drawn(block, block + 1).ids.tobytes() for block in range(20)}
    assert len(texts) == 20


def test_the_tail_is_measured_recorded_and_refused(dumped: Dumped, tmp_path: Path) -> None:
    source = open_cache(dumped.top_k)
    mean = float(real_rows(everything(source)).tail_mass.mean(dtype=np.float64))
    assert mean > 0.1
    with pytest.raises(CacheError, match=rf"leaves on average {mean:.4f} of the teacher's probability in the tails"):
        derive(dumped.top_k, tmp_path / "new", "sample:20")
    assert not (tmp_path / "new").exists()
    with pytest.raises(CacheError, match="in the tails"):
        derive(dumped.top_k, tmp_path / "new", "sample:20", max_tail_mass=mean - 0.001)
    result = derive_cache(
        dumped.top_k, tmp_path / "new", Derivation(Selection.parse("sample:20"), max_tail_mass=mean + 0.001)
    )
    assert result.notes == {"mean_tail_mass": pytest.approx(mean, abs=1e-6)}
    step = reopened(tmp_path / "new").manifest.identity.ancestry[-1]
    assert step.arguments["mean_tail_mass"] == result.notes["mean_tail_mass"]
    assert {"select": "sample:20", "from": "top-k:8", "seed": 0}.items() <= step.arguments.items()


def test_rows_without_ids_cannot_be_drawn_from(probabilities: Cache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"has rows without any id from block 0 on; nothing can be drawn$"):
        derive(probabilities.root, tmp_path / "new", "sample:5", max_tail_mass=1.0)


def test_identity_and_origin_are_carried_over(dumped: Dumped, tmp_path: Path) -> None:
    derive(dumped.dense, tmp_path / "one", "top-k:30")
    derive(tmp_path / "one", tmp_path / "two", "top-p:0.9:10")
    first, last = open_cache(dumped.dense), reopened(tmp_path / "two")
    for name in ("teacher", "tokenizer", "vocab_size", "corpus", "seed"):
        assert getattr(last.manifest.identity, name) == getattr(first.manifest.identity, name)
    assert last.manifest.origin == first.manifest.origin
    steps = last.manifest.identity.ancestry
    assert [(step.operation, step.arguments) for step in steps] == [
        ("derive", {"from": "top-k:300", "select": "top-k:30"}),
        ("derive", {"from": "top-k:30", "select": "top-p:0.9:10"}),
    ]
    assert [step.parents for step in steps] == [[first.fingerprint], [open_cache(tmp_path / "one").fingerprint]]


def test_chunks_grow_as_rows_shrink(tmp_path: Path) -> None:
    """Chunks of a top-k:300 are small; those of what is derived from it need not be, and blocks stay the same."""
    source = random_cache(tmp_path / "source", "logprob", 4, PROSE.model_copy(update={"chunk_blocks": 1}))
    derive(source.root, tmp_path / "new", "top-k:3")
    cache = reopened(tmp_path / "new")
    assert cache.manifest.identity.geometry == PROSE.model_copy(update={"chunk_blocks": 3})
    derive(source.root, tmp_path / "half", "top-k:4")
    assert reopened(tmp_path / "half").manifest.identity.geometry == PROSE.model_copy(update={"chunk_blocks": 2})
    old = keep_largest(real_rows(everything(source)), 3)
    np.testing.assert_array_equal(real_rows(everything(cache)).ids, old.ids)


REFUSED = [
    ("top-k:12", "top-k:64", "it keeps more than is stored"),
    ("top-k:12", "top-p:0.9:13", "it keeps more than is stored"),
    ("top-p:0.9:50", "top-p:0.95:50", "it keeps more than is stored"),
    ("top-p:0.9:50", "top-k:10", "it keeps more than is stored"),
    ("top-p:1.0:50", "top-k:10", "a row of top-p may hold fewer ids"),
    ("sample:20", "sample:21", "it needs more draws than are stored"),
    ("sample:20", "top-k:5", "draws do not tell which ids are the most probable"),
    ("top-k:12", "sample:20:0.8", "what is stored does not determine it"),
    ("sample:20:0.8", "sample:10:0.8", "what is stored does not determine it"),
    ("varopt:12", "sample:4", "what is stored does not determine it"),
    ("varopt:12", "top-k:4", "draws do not tell which ids are the most probable"),
    ("top-k:12", "varopt:8", "varopt rows are only made by a dump"),
    ("varopt:12", "varopt:8", "varopt rows are only made by a dump"),
    ("sample:20", "top-p:0.5:5", "draws do not tell which ids are the most probable"),
]


@pytest.mark.parametrize(("old", "new", "why"), REFUSED)
def test_what_cannot_be_derived(old: str, new: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        operation_for(Selection.parse(old), Selection.parse(new), "CACHE")
    text = str(Selection.parse(new))
    assert str(caught.value) == (
        f"{text} cannot be derived from CACHE, which holds {Selection.parse(old)}: {why}; dump with --select {text}"
    )


def test_wrong_arguments(draws: Cache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing of .*source would change; give another --select, --codec, or a"):
        derive(draws.root, tmp_path / "new", "sample:9")
    with pytest.raises(UsageError, match="column 'tail_mass' cannot be dropped; choose of entropy, label_logprob"):
        Derivation(drop=("tail_mass",))
    with pytest.raises(UsageError, match="seed is -1"):
        Derivation(seed=-1)
    with pytest.raises(UsageError, match=r"max-tail-mass is nan; it must lie between 0 and 1"):
        Derivation(max_tail_mass=float("nan"))
    with pytest.raises(UsageError, match=r"source is the cache to read from; choose another folder for --out"):
        derive(draws.root, draws.root, "sample:4")
    make_cache(tmp_path / "half", units=range(1))
    with pytest.raises(CacheError, match="half is unfinished"):
        derive(tmp_path / "half", tmp_path / "new", "sample:4")
    assert not (tmp_path / "new").exists()


def test_other_arguments_on_the_same_folder(draws: Cache, tmp_path: Path) -> None:
    derive(draws.root, tmp_path / "new", "sample:4")
    before = files_of(tmp_path / "new")
    with pytest.raises(PlanMismatchError) as caught:
        derive(draws.root, tmp_path / "new", "sample:5", seed=2)
    assert str(caught.value).splitlines()[1:] == [
        "  --seed: the cache has 0, this run 2",
        "  --select: the cache has 'sample:4', this run 'sample:5'",
    ]
    assert {"ancestry.0.arguments.seed", "selection.size"} < {field for field, _, _ in caught.value.differences}
    again = derive_cache(draws.root, tmp_path / "new", Derivation(Selection.parse("sample:4")))
    assert again.computed_tokens == 0
    assert files_of(tmp_path / "new") == before
