"""The row codecs: what comes back, what is refused, and what damaged planes do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from logitcache.codec import (
    Codebook,
    CodedRows,
    CountValues,
    HeadTailValues,
    LayoutName,
    Planes,
    ProbabilityValues,
    RowCodec,
    WeightValues,
)
from logitcache.errors import DamagedCacheError, FormatVersionError, TargetsError
from logitcache.store.container_file import dtypes_of
from logitcache.targets import SparseTargets
from tests.codec.rows import assert_equal, count_rows, generators, probability_rows, varopt_rows, weight_rows

many = settings(max_examples=60, deadline=None, derandomize=True)
vocabularies = st.sampled_from([1, 2, 17, 300, 65_537, (1 << 18) + 5])
layouts = st.sampled_from(["small", "fast"])
SIDE_STEP = 1 / 128 + 1e-6
MAKERS: dict[str, Callable[..., SparseTargets]] = {
    "counts": count_rows,
    "probabilities": probability_rows,
    "weights": weight_rows,
    "head-tail": varopt_rows,
}


def values_of(kind: str, size: int = 9) -> Any:
    return {
        "counts": CountValues(size),
        "probabilities": ProbabilityValues(),
        "weights": WeightValues(),
        "head-tail": HeadTailValues(),
    }[kind]


def half(count: int) -> NDArray[np.float64]:
    return np.full(count, 0.5)


def tokens_for(targets: SparseTargets, vocab_size: int, seed: int = 0) -> NDArray[np.int64]:
    """Few different tokens, so that contexts repeat, and sometimes the row's own ids as next tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, min(vocab_size, 4), len(targets))
    follows = np.flatnonzero(targets.row_lengths[:-1]) if len(targets) else np.zeros(0, dtype=np.int64)
    tokens[follows[::2] + 1] = targets.ids[targets.offsets[follows[::2]]]
    return tokens


def book(tokens: NDArray[np.int64], targets: SparseTargets, vocab_size: int) -> Codebook:
    """Counted from half of the rows, so that listed and unlisted ids both occur."""
    pilot = len(targets) // 2
    return Codebook.from_pilot(tokens[:pilot], targets.slice(0, pilot), vocab_size, with_contexts=True)


def round_trip(codec: RowCodec, targets: SparseTargets, vocab_size: int, seed: int = 0) -> SparseTargets:
    tokens = tokens_for(targets, vocab_size, seed)
    tables = book(tokens, targets, vocab_size)
    planes = codec.encode(tokens, targets, tables, np.random.default_rng(seed).random)
    assert all(plane.min(initial=0) >= 0 for plane in planes.values())
    return codec.decode(tokens, as_stored(planes), tables)


def as_stored(planes: Planes) -> Planes:
    """In the types that `Cache` hands to a codec: the container's narrow unsigned ones, int64 for its widest."""
    narrow = {name: np.int64 if dtype.itemsize == 8 else dtype for name, dtype in dtypes_of([planes]).items()}
    return {name: plane.astype(narrow[name]) for name, plane in planes.items()}


def check_ids_and_side_columns(stored: SparseTargets, original: SparseTargets) -> None:
    np.testing.assert_array_equal(stored.offsets, original.offsets)
    np.testing.assert_array_equal(stored.ids, original.ids)
    assert stored.unbiased == original.unbiased
    for name in ("label_logprob", "entropy"):
        mine, theirs = getattr(stored, name), getattr(original, name)
        np.testing.assert_array_equal(np.isnan(mine), np.isnan(theirs))
        np.testing.assert_array_equal(np.isneginf(mine), np.isneginf(theirs))
        finite = np.isfinite(theirs)
        np.testing.assert_allclose(mine[finite], theirs[finite], rtol=1e-6, atol=SIDE_STEP)


# ---------------------------------------------------------------------------------------------- round trips


@many
@given(generators, layouts, st.integers(0, 25), vocabularies, st.sampled_from([1, 2, 13, 400]))
def test_counts_come_back_exactly(
    rng: np.random.Generator, layout: LayoutName, rows: int, vocab_size: int, draws: int
) -> None:
    targets = count_rows(rng, rows, vocab_size, draws)
    decoded = round_trip(RowCodec(layout, CountValues(draws)), targets, vocab_size)
    check_ids_and_side_columns(decoded, targets)
    assert_equal(decoded.with_columns(targets.label_logprob, targets.entropy), targets)


@many
@given(generators, layouts, st.integers(0, 25), vocabularies, st.sampled_from([1, 2, 13, 300]))
def test_probabilities_come_back_within_a_step(
    rng: np.random.Generator, layout: LayoutName, rows: int, vocab_size: int, longest: int
) -> None:
    targets = probability_rows(rng, rows, vocab_size, longest)
    decoded = round_trip(RowCodec(layout, ProbabilityValues()), targets, vocab_size)
    check_ids_and_side_columns(decoded, targets)
    check_probabilities(decoded, targets)


def check_probabilities(decoded: SparseTargets, targets: SparseTargets) -> None:
    filled = targets.row_lengths > 0
    np.testing.assert_allclose((decoded.row_sums() + decoded.tail_mass)[filled], 1, atol=1e-6)
    inside = (targets.tail_mass > 0) & (targets.tail_mass < 1)
    for mine, theirs in ((decoded.tail_mass, targets.tail_mass), (1 - decoded.tail_mass, 1 - targets.tail_mass)):
        with np.errstate(divide="ignore"):
            error = np.abs(np.log(mine[inside].astype(np.float64)) - np.log(theirs[inside].astype(np.float64)))
        # float32 holds 1 - tail only to 6e-8.
        assert (error <= 1 / 32 + 1e-7 / theirs[inside]).all()
    np.testing.assert_array_equal(decoded.tail_mass[~inside], targets.tail_mass[~inside])
    # Proportions within a row: half a root step each, and what the others' errors do to the scale.
    rows = targets.row_index()
    share = targets.weights / targets.row_sums()[rows]
    after = decoded.weights / decoded.row_sums()[rows]
    error = np.abs(after - share)
    step = np.sqrt(targets.weights.astype(np.float64)) / 256 / np.minimum(1, targets.row_sums())[rows]
    scale = np.bincount(rows, step, minlength=len(targets))[rows]
    precise = targets.weights > 1e-36
    assert (error[precise] <= (1.2 * step + 1.5 * share * scale + 0.1 * share)[precise]).all()


@many
@given(generators, layouts, st.integers(0, 25), vocabularies, st.sampled_from([1, 2, 13, 300]))
def test_varopt_rows(rng: np.random.Generator, layout: LayoutName, rows: int, vocab_size: int, size: int) -> None:
    """Ids exactly; weights sum to 1; the tail's weight is the threshold, bit for bit; rows of one kind stay so."""
    targets = varopt_rows(rng, rows, vocab_size, size)
    decoded = round_trip(RowCodec(layout, HeadTailValues()), targets, vocab_size)
    check_ids_and_side_columns(decoded, targets)
    np.testing.assert_allclose(decoded.row_sums(), 1, atol=1e-5)
    row = targets.row_index()
    was_tail = targets.weights <= targets.threshold[row]
    np.testing.assert_array_equal(decoded.weights[was_tail], decoded.threshold[row][was_tail])
    np.testing.assert_array_equal(decoded.threshold == 0, targets.threshold == 0)
    assert (decoded.weights > 0).all()


@many
@given(generators, layouts, st.integers(0, 25), vocabularies, st.sampled_from([1, 2, 13, 300]))
def test_importance_weights(
    rng: np.random.Generator, layout: LayoutName, rows: int, vocab_size: int, longest: int
) -> None:
    targets = weight_rows(rng, rows, vocab_size, longest)
    decoded = round_trip(RowCodec(layout, WeightValues()), targets, vocab_size)
    check_ids_and_side_columns(decoded, targets)
    # A step is an eighth of a nat at most.
    np.testing.assert_array_less(np.abs(np.log(decoded.weights / targets.weights)), 0.126)


@pytest.mark.parametrize("kind", ["weights", "head-tail"])
def test_decoded_weights_are_unbiased(kind: str) -> None:
    """Over many roundings, the mean of each decoded weight is within 4 standard errors of the weight."""
    rng = np.random.default_rng(5)
    if kind == "weights":
        targets = SparseTargets([0, 5], np.arange(5), [3.0, 0.4, 0.01, 1e-4, 1e-9], unbiased=True)
    else:
        weights = [0.5, 0.2, 0.11, 0.09, 0.025, 0.025, 0.025, 0.025]
        targets = SparseTargets([0, 8], np.arange(8), weights, threshold=[0.025], unbiased=True)
    codec, rounds = values_of(kind), 4000
    repeated = SparseTargets.concatenate([targets] * rounds)
    codes, of_rows = codec.encode(repeated, rng.random)
    decoded = codec.decode(codes, of_rows, repeated.offsets).weights.reshape(rounds, -1).astype(np.float64)
    error = decoded.mean(0) - targets.weights
    standard = decoded.std(0) / np.sqrt(rounds) + 1e-7 * targets.weights
    assert (decoded.std(0) > 0).all(), "nothing was rounded at random"
    assert (np.abs(error) <= 4 * standard).all(), error / standard


def test_decoded_varopt_rows_can_be_stored_again() -> None:
    """Rounding may leave a head weight below the threshold; such a row is still one of its kind."""
    targets = varopt_rows(np.random.default_rng(8), 3000, 300, 12)
    codec = RowCodec("small", HeadTailValues())
    decoded = round_trip(codec, targets, 300)
    below = decoded.weights < decoded.threshold[decoded.row_index()]
    assert below.any()
    again = round_trip(codec, decoded, 300, seed=1)
    np.testing.assert_array_equal(again.ids, decoded.ids)
    np.testing.assert_allclose(again.row_sums(), 1, atol=1e-5)


def test_flat_heads_use_a_finer_grid() -> None:
    """Thousands of equal weights leave the largest no room for the others' rounding errors on a coarse grid."""
    for count in (4, 50, 1000, 65_535):
        targets = SparseTargets([0, count], np.arange(count), np.full(count, 1 / count), threshold=[0], unbiased=True)
        decoded = round_trip(RowCodec("small", HeadTailValues()), targets, 70_000)
        np.testing.assert_allclose(decoded.row_sums(), 1, atol=1e-3)
        # The largest weight takes up what rounding did to all others.
        assert np.median(np.abs(np.log(decoded.weights * count))) < 0.2
        assert decoded.weights.min() > 0


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_move_between_layouts_and_codebooks_without_loss(kind: str) -> None:
    """`unpack` and `pack` round nothing: any number of moves gives the same rows."""
    targets = MAKERS[kind](np.random.default_rng(3), 40, 300, 9)
    tokens = tokens_for(targets, 300)
    small, fast = RowCodec("small", values_of(kind)), RowCodec("fast", values_of(kind))
    one, other = book(tokens, targets, 300), book(tokens[:4], targets.slice(0, 4), 300)
    coded = small.code(targets, np.random.default_rng(0).random)
    moved = fast.unpack(tokens, fast.pack(tokens, coded, other), other)
    moved = small.unpack(tokens, small.pack(tokens, moved, one), one)
    assert_equal(small.targets(moved), small.targets(coded))
    joined = CodedRows.concatenate([moved.slice(0, 13), moved.slice(13, 40)])
    assert_equal(small.targets(joined), small.targets(coded))
    assert_equal(small.targets(moved.slice(5, 9)), small.targets(coded).slice(5, 9))


def test_a_finer_grid_stores_finer_weights() -> None:
    targets = probability_rows(np.random.default_rng(0), 50, 1000, 30)
    errors = []
    for steps in (50, 300, 3000):
        decoded = round_trip(RowCodec("fast", ProbabilityValues(steps)), targets, 1000)
        errors.append(float(np.abs(decoded.weights - targets.weights).mean()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


@pytest.mark.parametrize("layout", ["small", "fast"])
def test_the_largest_rows_and_ids(layout: LayoutName) -> None:
    """65,535 entries in a row, and ids up to 2^32 - 1."""
    length, vocab_size = 65_535, 2**32
    weights = np.random.default_rng(1).exponential(1, length) + 1e-3
    ids = np.arange(length) * 65_537 + 65_537
    assert ids[-1] == vocab_size - 1
    row = SparseTargets([0, 0, length], ids, weights / weights.sum(), label_logprob=[-1, -1], entropy=[9, 9])
    codec, tokens = RowCodec(layout, ProbabilityValues()), np.array([2**32 - 1, 5])
    tables = Codebook.from_pilot(tokens, row, vocab_size, with_contexts=True)
    decoded = codec.decode(tokens, codec.encode(tokens, row, tables, half), tables)
    np.testing.assert_array_equal(decoded.ids, row.ids)
    check_probabilities(decoded, row)
    one_more = SparseTargets([0, 0, length + 1], np.arange(length + 1), np.full(length + 1, 1 / (length + 1)))
    with pytest.raises(TargetsError, match=r"^row 1 has 65536 entries; a cache stores at most 65535 a row$"):
        codec.encode(tokens, one_more, tables, half)


# ---------------------------------------------------------------------------------------------- refusals

NOTHING = np.zeros(0, dtype=np.int64)
RANKS = Codebook.from_pilot(
    np.array([1, 1, 2, 2]),
    SparseTargets([0, 2, 4, 5, 6], [3, 7, 3, 7, 7, 9], np.full(6, 0.5)),
    50,
    with_contexts=True,
)


def sampled(weights: list[float]) -> SparseTargets:
    """A good row 0 of 4 draws, then a row with these weights."""
    ids = [2, *range(10, 10 + len(weights))]
    return SparseTargets([0, 1, 1 + len(weights)], ids, [1.0, *weights], unbiased=True)


@pytest.mark.parametrize("weights", [[0.5, 0.25], [0.5, 0.3, 0.2], [1.0, 0.25], [1.0, 0.0], []])
def test_weights_that_are_no_counts(weights: list[float]) -> None:
    CountValues(4).encode(sampled([0.5, 0.25, 0.25]), half)
    with pytest.raises(TargetsError, match=r"^row 1's weights are not counts among 4 draws$"):
        CountValues(4).encode(sampled(weights), half)


@pytest.mark.parametrize(
    ("weights", "threshold"),
    [([0.5, 0.3, 0.1], 0.1), ([0.5, 0.5, 0.5], 0.0), ([0.9, 0.1, 0.0], 0.0)],
)
def test_rows_that_are_no_varopt_rows(weights: list[float], threshold: float) -> None:
    targets = SparseTargets([0, 0, 3], [1, 2, 3], weights, threshold=[0, threshold], unbiased=True)
    with pytest.raises(TargetsError, match=r"^row 1 is no varopt row"):
        HeadTailValues().encode(targets, half)


def test_importance_weights_out_of_range() -> None:
    for weight, message in ((0.0, "^row 0 stores an entry of weight 0"), (2e6, r"^row 0 has a weight over 1e\+06")):
        with pytest.raises(TargetsError, match=message):
            WeightValues().encode(SparseTargets([0, 1], [1], [weight], unbiased=True), half)


def test_targets_of_the_other_kind() -> None:
    biased = SparseTargets([0, 1], [2], [0.5])
    with pytest.raises(TargetsError, match=r"^the counts codec stores unbiased samples; these targets hold exact"):
        RowCodec("small", CountValues(4)).code(biased, half)
    with pytest.raises(TargetsError, match=r"^the probabilities codec stores exact probabilities; these targets"):
        RowCodec("small", ProbabilityValues()).code(sampled([1.0]), half)


@pytest.mark.parametrize("layout", ["small", "fast"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": [0.5, 0.5, 0.0]}, "^row 2 stores an entry of weight 0; leave it out$"),
        ({"tail_mass": [0.5, 0.2, 0.5]}, "^row 1's probabilities and tail mass sum to 0.7"),
        ({"ids": [1, 50, 3]}, "^row 1 holds token id 50, but the vocabulary has 50 ids"),
        ({"label_logprob": [-1, -1, 0.5]}, "^row 2's label_logprob is on the wrong side of 0$"),
        ({"label_logprob": [-1, np.inf, -1]}, "^row 1's label_logprob is infinite and above 0$"),
        ({"label_logprob": [-1, -1e30, -1]}, "^row 1's label_logprob is further from 0 than"),
        ({"entropy": [1, 1, -0.5]}, "^row 2's entropy is on the wrong side of 0$"),
        ({"entropy": [1, np.inf, 1]}, "^row 1's entropy is infinite$"),
        ({"entropy": [1e30, 1, 1]}, "^row 0's entropy is further from 0 than"),
    ],
)
def test_values_that_cannot_be_stored(layout: LayoutName, fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"offsets": [0, 1, 2, 3], "ids": [1, 2, 3], "weights": [0.5, 0.5, 0.5]}
    codec, tokens = RowCodec(layout, ProbabilityValues()), np.array([1, 2, 3])
    codec.encode(tokens, SparseTargets(**good), RANKS, half)
    with pytest.raises(TargetsError, match=message):
        codec.encode(tokens, SparseTargets(**{**good, **fields}), RANKS, half)


def test_rounding_above_one_is_no_error() -> None:
    """Probabilities and log-probabilities may pass 1 and 0 by rounding; they come back as 1 and 0."""
    row = SparseTargets([0, 1], [4], [1.0005], tail_mass=[0], label_logprob=[5e-4], entropy=[-5e-4])
    decoded = round_trip(RowCodec("small", ProbabilityValues()), row, 50)
    assert (decoded.weights[0], decoded.tail_mass[0], decoded.label_logprob[0], decoded.entropy[0]) == (1, 0, 0, 0)


# ---------------------------------------------------------------------------------------------- damage

TOKENS = np.array([1, 2, 1, 3, 2, 1])
cases = pytest.mark.parametrize("kind", MAKERS)
both = pytest.mark.parametrize("layout", ["small", "fast"])


def encoded(kind: str, layout: LayoutName) -> tuple[RowCodec, Planes]:
    codec = RowCodec(layout, values_of(kind))
    targets = MAKERS[kind](np.random.default_rng(2), 6, 50, 9)
    return codec, codec.encode(TOKENS, targets, RANKS, half)


@cases
@both
def test_planes_of_wrong_size(kind: str, layout: LayoutName) -> None:
    """Any plane longer, shorter or absent, or another number of rows than asked for."""
    codec, planes = encoded(kind, layout)
    codec.decode(TOKENS, planes, RANKS)
    for name, plane in planes.items():
        for other in (plane[:-1], np.append(plane, 0), np.append(plane, plane), plane[:0]):
            with pytest.raises(DamagedCacheError):
                codec.decode(TOKENS, {**planes, name: other}, RANKS)
        with pytest.raises(DamagedCacheError, match=rf"^there is no plane '{name}'$"):
            codec.decode(TOKENS, {key: value for key, value in planes.items() if key != name}, RANKS)
    with pytest.raises(DamagedCacheError, match=r"^plane 'more' is none of this codec$"):
        codec.decode(TOKENS, {**planes, "more": TOKENS}, RANKS)
    for tokens in (TOKENS[:5], np.append(TOKENS, 1), TOKENS[:0]):
        with pytest.raises(DamagedCacheError):
            codec.decode(tokens, planes, RANKS)


@cases
@both
def test_any_changed_number_is_refused_or_gives_valid_rows(kind: str, layout: LayoutName) -> None:
    """Planes are checksummed; behind the checksum still nothing invalid may come out, nor any other exception."""
    codec, planes = encoded(kind, layout)
    for name, plane in planes.items():
        for index in range(plane.size):
            for value in (0, 1, 2, 49, 300, 65_535, 1 << 20, 1 << 40, (1 << 63) - 1):
                changed = plane.copy()
                changed[index] = value
                try:
                    rows = codec.decode(TOKENS, {**planes, name: changed}, RANKS)
                except DamagedCacheError:
                    continue
                SparseTargets(**{field: getattr(rows, field) for field in rows.__dataclass_fields__})
                rows.check_vocabulary(50)


@both
def test_counts_that_do_not_sum(layout: LayoutName) -> None:
    codec, planes = encoded("counts", layout)
    for index in range(planes["counts"].size):
        for change in (1, 9, 1 << 40):
            counts = planes["counts"].copy()
            counts[index] += change
            with pytest.raises(DamagedCacheError):
                codec.decode(TOKENS, {**planes, "counts": counts}, RANKS)


@both
def test_ids_outside_the_vocabulary(layout: LayoutName) -> None:
    codec, planes = encoded("probabilities", layout)
    for index in range(planes["ids"].size):
        for value in (1 << 20, (1 << 63) - 1):
            ids = planes["ids"].copy()
            ids[index] = value
            with pytest.raises(DamagedCacheError, match=r"outside the vocabulary"):
                codec.decode(TOKENS, {**planes, "ids": ids}, RANKS)


def test_an_id_twice_in_a_row_is_damage() -> None:
    """The next token may be a candidate too: the same id under two keys."""
    codec, planes = encoded("probabilities", "small")
    one_row = {name: plane[:1] for name, plane in planes.items()}
    one_row |= {"lengths": np.array([2]), "levels": np.array([0, 1])}
    last = np.array([9])
    candidates = RANKS.contexts.encode(np.array([2]), np.array([-1]), np.array([0]), np.array([7]))
    assert candidates[0] == 1, "the pilot saw 7 twice after token 2"
    with pytest.raises(DamagedCacheError, match=r"^an entry stands for the next token where there is none$"):
        codec.decode(last, {**one_row, "ids": np.array([0, 0])}, RANKS)
    two_rows = {name: np.append(plane[:1], plane[:1]) for name, plane in planes.items()}
    two_rows |= {"lengths": np.array([2, 0]), "levels": np.array([0, 1]), "ids": np.array([0, 0])}
    with pytest.raises(DamagedCacheError, match=r"^a row holds one id twice$"):
        codec.decode(np.array([2, 7]), two_rows, RANKS)


@both
@pytest.mark.parametrize("claim", [1 << 40, 65_536, 65_535])
def test_lengths_that_claim_too_much(layout: LayoutName, claim: int) -> None:
    """Refused before a grid of that size is allocated."""
    codec, planes = encoded("probabilities", layout)
    lengths = planes["lengths"].copy()
    lengths[0] = claim
    with pytest.raises(DamagedCacheError):
        codec.decode(TOKENS, {**planes, "lengths": lengths}, RANKS)


@pytest.mark.parametrize("code", [2, 10**4, (1 << 63) - 1])
def test_tails_outside_their_range(code: int) -> None:
    codec, planes = encoded("probabilities", "small")
    tail = planes["tail"].copy()
    tail[3] = code
    if code == 2:
        assert codec.decode(TOKENS, {**planes, "tail": tail}, RANKS).tail_mass[3] < 1e-37
        return
    with pytest.raises(DamagedCacheError, match=r"^a stored tail mass is outside its range$"):
        codec.decode(TOKENS, {**planes, "tail": tail}, RANKS)


# ---------------------------------------------------------------------------------------------- JSON


def test_codecs_round_trip_through_json() -> None:
    for kind in MAKERS:
        for layout in ("small", "fast"):
            codec = RowCodec(layout, values_of(kind, 25))  # type: ignore[arg-type]
            assert RowCodec.from_dict(codec.to_dict()) == codec


@pytest.mark.parametrize(
    "fields",
    [
        {"layout": "small", "values": "bigram"},
        {},
        {"layout": "small", "values": []},
        {"layout": "tiny", "values": "counts", "draws": 9},
        {"layout": [], "values": "counts", "draws": 9},
        {"layout": "small", "values": "counts"},
        {"layout": "small", "values": "counts", "draws": 0},
        {"layout": "small", "values": "counts", "draws": "9"},
        {"layout": "small", "values": "counts", "draws": True},
        {"layout": "small", "values": "counts", "draws": 1 << 20},
        {"layout": "small", "values": "probabilities"},
        {"layout": "small", "values": "probabilities", "root_steps": 15},
        {"layout": "small", "values": "probabilities", "root_steps": 16, "more": 1},
    ],
)
def test_unknown_codecs_ask_for_an_upgrade(fields: dict[str, Any]) -> None:
    with pytest.raises(FormatVersionError, match=r"is unknown to this version; upgrade logitcache$"):
        RowCodec.from_dict(fields)
