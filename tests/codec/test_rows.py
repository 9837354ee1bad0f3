"""The row codecs: what comes back, what is refused, and what damaged planes do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.codec import CountsCodec, FrequencyRanks, LogprobCodec, Planes, codec_from_dict
from logitcache.errors import DamagedCacheError, FormatVersionError, TargetsError
from logitcache.targets import SparseTargets
from tests.codec.rows import assert_equal, count_rows, generators, probability_rows

many = settings(max_examples=60, deadline=None, derandomize=True)
vocabularies = st.sampled_from([1, 2, 17, 300, 65_537, (1 << 18) + 5])
HALF_STEP = 1 / 32
SIDE_STEP = 1 / 128 + 1e-6


def ranks_for(targets: SparseTargets, vocab_size: int, share: float = 0.5) -> FrequencyRanks:
    """A table counted from part of the ids, so that listed and unlisted ids both occur."""
    return FrequencyRanks.from_ids(targets.ids[: int(targets.ids.size * share)], vocab_size)


def check_side_columns(stored: SparseTargets, original: SparseTargets) -> None:
    for name in ("label_logprob", "entropy"):
        mine, theirs = getattr(stored, name), getattr(original, name)
        np.testing.assert_array_equal(np.isnan(mine), np.isnan(theirs))
        np.testing.assert_array_equal(np.isneginf(mine), np.isneginf(theirs))
        finite = np.isfinite(theirs)
        np.testing.assert_allclose(mine[finite], theirs[finite], rtol=1e-6, atol=SIDE_STEP)


# ---------------------------------------------------------------------------------------------- round trips


@many
@given(generators, st.integers(0, 25), vocabularies, st.sampled_from([1, 2, 13, 400]))
def test_counts_come_back_exactly(rng: np.random.Generator, rows: int, vocab_size: int, draws: int) -> None:
    targets = count_rows(rng, rows, vocab_size, draws)
    codec, ranks = CountsCodec(draws), ranks_for(targets, vocab_size)
    planes = codec.encode(targets, ranks)
    assert all(plane.min(initial=0) >= 0 for plane in planes.values())
    decoded = codec.decode(planes, rows, ranks)
    check_side_columns(decoded, targets)
    assert_equal(decoded.with_columns(targets.label_logprob, targets.entropy), targets)


@many
@given(generators, st.integers(0, 25), vocabularies, st.sampled_from([1, 2, 13, 300]))
def test_probabilities_come_back_within_a_step(
    rng: np.random.Generator, rows: int, vocab_size: int, longest: int
) -> None:
    targets = probability_rows(rng, rows, vocab_size, longest)
    codec, ranks = LogprobCodec(), ranks_for(targets, vocab_size)
    planes = codec.encode(targets, ranks)
    assert all(plane.min(initial=0) >= 0 for plane in planes.values())
    decoded = codec.decode(planes, rows, ranks)
    np.testing.assert_array_equal(decoded.offsets, targets.offsets)
    np.testing.assert_array_equal(decoded.ids, targets.ids)
    assert not decoded.unbiased
    check_side_columns(decoded, targets)
    check_weights(decoded, targets)


def check_weights(decoded: SparseTargets, targets: SparseTargets) -> None:
    """Half a step for an entry, half a step for what its row sums to, and the tail's own half step."""
    filled = targets.row_lengths > 0
    sums = decoded.row_sums() + decoded.tail_mass
    np.testing.assert_allclose(sums[filled], 1, atol=1e-6)
    inside = (targets.tail_mass > 0) & (targets.tail_mass < 1)
    for mine, theirs in ((decoded.tail_mass, targets.tail_mass), (1 - decoded.tail_mass, 1 - targets.tail_mass)):
        with np.errstate(divide="ignore"):
            error = np.abs(np.log(mine[inside].astype(np.float64)) - np.log(theirs[inside].astype(np.float64)))
        # float32 holds 1 - tail only to 6e-8.
        assert (error <= HALF_STEP + 1e-7 / theirs[inside]).all()
    np.testing.assert_array_equal(decoded.tail_mass[~inside], targets.tail_mass[~inside])
    share = np.divide(1, targets.row_sums(), out=np.zeros(len(targets)), where=filled)
    share_after = np.divide(1, decoded.row_sums(), out=np.zeros(len(targets)), where=filled)
    rows = targets.row_index()
    before, after = targets.weights * share[rows], decoded.weights * share_after[rows]
    # Subnormal float32 numbers have no relative precision.
    precise = targets.weights > 1e-36
    assert np.abs(np.log(after[precise] / before[precise])).max(initial=0) <= 2 * HALF_STEP + 1e-4


def test_a_finer_step_stores_finer_weights() -> None:
    targets = probability_rows(np.random.default_rng(0), 50, 1000, 30)
    errors = []
    for steps in (4, 16, 256):
        codec, ranks = LogprobCodec(steps), ranks_for(targets, 1000)
        decoded = codec.decode(codec.encode(targets, ranks), 50, ranks)
        large = targets.weights > 1e-6
        errors.append(float(np.abs(np.log(decoded.weights[large] / targets.weights[large])).mean()))
    assert errors[0] > errors[1] > errors[2]


def test_the_largest_rows_and_ids() -> None:
    """65,535 entries in a row, and ids that need 33 bits."""
    length = 65_535
    weights = np.random.default_rng(1).exponential(1, length) + 1e-3
    row = SparseTargets([0, length], np.arange(length) * 2, weights / weights.sum(), label_logprob=[-1], entropy=[9])
    ranks = FrequencyRanks(2 * length, np.zeros(0, dtype=np.int64))
    decoded = LogprobCodec().decode(LogprobCodec().encode(row, ranks), 1, ranks)
    np.testing.assert_array_equal(decoded.ids, row.ids)
    check_weights(decoded, row)
    one_more = SparseTargets([0, 0, length + 1], np.arange(length + 1), np.full(length + 1, 1 / (length + 1)))
    with pytest.raises(TargetsError, match=r"^row 1 has 65536 entries; a cache stores at most 65535 a row$"):
        LogprobCodec().encode(one_more, ranks)


# ---------------------------------------------------------------------------------------------- refusals

RANKS = FrequencyRanks(50, np.array([7, 3]))


def sampled(weights: list[float]) -> SparseTargets:
    """A good row 0 of 4 draws, then a row with these weights."""
    ids = [2, *range(10, 10 + len(weights))]
    return SparseTargets([0, 1, 1 + len(weights)], ids, [1.0, *weights], unbiased=True)


@pytest.mark.parametrize("weights", [[0.5, 0.25], [0.5, 0.3, 0.2], [1.0, 0.25], [1.0, 0.0], []])
def test_weights_that_are_no_counts(weights: list[float]) -> None:
    CountsCodec(4).encode(sampled([0.5, 0.25, 0.25]), RANKS)
    with pytest.raises(TargetsError, match=r"^row 1's weights are not counts among 4 draws$"):
        CountsCodec(4).encode(sampled(weights), RANKS)


def test_targets_of_the_other_kind() -> None:
    biased = SparseTargets([0, 1], [2], [0.5])
    with pytest.raises(TargetsError, match=r"^the counts codec stores sampled targets"):
        CountsCodec(4).encode(biased, RANKS)
    with pytest.raises(TargetsError, match=r"^the log-probability codec stores exact probabilities"):
        LogprobCodec().encode(sampled([1.0]), RANKS)


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
def test_values_that_cannot_be_stored(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"offsets": [0, 1, 2, 3], "ids": [1, 2, 3], "weights": [0.5, 0.5, 0.5]}
    LogprobCodec().encode(SparseTargets(**good), RANKS)
    with pytest.raises(TargetsError, match=message):
        LogprobCodec().encode(SparseTargets(**{**good, **fields}), RANKS)


def test_sampled_ids_outside_the_vocabulary() -> None:
    targets = SparseTargets([0, 1, 2], [1, 50], [1, 1], unbiased=True)
    with pytest.raises(TargetsError, match=r"^row 1 holds token id 50"):
        CountsCodec(4).encode(targets, RANKS)


def test_rounding_above_one_is_no_error() -> None:
    """Probabilities and log-probabilities may pass 1 and 0 by rounding; they come back as 1 and 0."""
    row = SparseTargets([0, 1], [4], [1.0005], tail_mass=[0], label_logprob=[5e-4], entropy=[-5e-4])
    decoded = LogprobCodec().decode(LogprobCodec().encode(row, RANKS), 1, RANKS)
    assert (decoded.weights[0], decoded.tail_mass[0], decoded.label_logprob[0], decoded.entropy[0]) == (1, 0, 0, 0)


# ---------------------------------------------------------------------------------------------- damage


def encoded(kind: str, rows: int = 6) -> tuple[Any, Planes]:
    rng = np.random.default_rng(2)
    if kind == "counts":
        return CountsCodec(9), CountsCodec(9).encode(count_rows(rng, rows, 50, 9), RANKS)
    return LogprobCodec(), LogprobCodec().encode(probability_rows(rng, rows, 50, 9), RANKS)


@pytest.mark.parametrize("kind", ["counts", "logprob"])
def test_planes_of_wrong_size(kind: str) -> None:
    """Any plane longer, shorter or absent, or another number of rows than asked for."""
    codec, planes = encoded(kind)
    codec.decode(planes, 6, RANKS)
    for name, plane in planes.items():
        for other in (plane[:-1], np.append(plane, 0), np.append(plane, plane), plane[:0]):
            with pytest.raises(DamagedCacheError):
                codec.decode({**planes, name: other}, 6, RANKS)
        with pytest.raises(DamagedCacheError, match=rf"^there is no plane '{name}'$"):
            codec.decode({key: value for key, value in planes.items() if key != name}, 6, RANKS)
    for rows in (5, 7, 0):
        with pytest.raises(DamagedCacheError):
            codec.decode(planes, rows, RANKS)


def test_counts_that_do_not_sum() -> None:
    codec, planes = encoded("counts")
    for index in range(planes["counts"].size):
        for change in (1, 9, 1 << 40):
            counts = planes["counts"].copy()
            counts[index] += change
            with pytest.raises(DamagedCacheError):
                codec.decode({**planes, "counts": counts}, 6, RANKS)


@pytest.mark.parametrize("kind", ["counts", "logprob"])
def test_ranks_outside_the_vocabulary(kind: str) -> None:
    codec, planes = encoded(kind)
    for index in range(planes["ids"].size):
        for value in (50, 1 << 20, (1 << 63) - 1):
            ids = planes["ids"].copy()
            ids[index] = value
            with pytest.raises(DamagedCacheError, match=r"outside the vocabulary of 50 ids"):
                codec.decode({**planes, "ids": ids}, 6, RANKS)


def test_steps_that_wrap_around_are_no_ranks() -> None:
    """Rank steps whose sum overflows 64 bits must not come out as small ranks."""
    planes = {"ids": np.array([3, (1 << 63) - 1, (1 << 63) - 2]), "counts": np.array([0, 0, 0])}
    planes |= {"label_logprob": np.array([0]), "entropy": np.array([0])}
    with pytest.raises(DamagedCacheError):
        CountsCodec(3).decode(planes, 1, RANKS)


def test_lengths_that_claim_too_much() -> None:
    """Refused before a grid of that size is allocated."""
    codec, planes = encoded("logprob")
    for claim in (1 << 40, 65_536, 65_535):
        lengths = planes["lengths"].copy()
        lengths[0] = claim
        with pytest.raises(DamagedCacheError):
            codec.decode({**planes, "lengths": lengths}, 6, RANKS)


def test_equal_ids_in_a_row_are_damage() -> None:
    ids = np.array([3, 3])
    planes = {"lengths": np.array([2]), "ids": ids, "logprobs": np.array([4, 0]), "tail": np.array([0])}
    planes |= {"label_logprob": np.array([0]), "entropy": np.array([0])}
    with pytest.raises(TargetsError, match=r"not ascending and unique"):
        LogprobCodec().decode(planes, 1, RANKS)
    assert LogprobCodec().decode({**planes, "ids": np.array([3, 4])}, 1, RANKS).ids.size == 2


@pytest.mark.parametrize("code", [2, 10**4, (1 << 63) - 1])
def test_tails_outside_their_range(code: int) -> None:
    codec, planes = encoded("logprob")
    tail = planes["tail"].copy()
    tail[3] = code
    if code == 2:
        assert codec.decode({**planes, "tail": tail}, 6, RANKS).tail_mass[3] < 1e-37
        return
    with pytest.raises(DamagedCacheError, match=r"^a stored tail mass is outside its range$"):
        codec.decode({**planes, "tail": tail}, 6, RANKS)


# ---------------------------------------------------------------------------------------------- JSON


def test_codecs_round_trip_through_json() -> None:
    for codec in (CountsCodec(25), LogprobCodec(), LogprobCodec(64)):
        assert codec_from_dict(codec.to_dict()) == codec


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "bigram"},
        {},
        {"name": []},
        {"name": "counts"},
        {"name": "counts", "draws": 0},
        {"name": "counts", "draws": "9"},
        {"name": "counts", "draws": True},
        {"name": "counts", "draws": 1 << 20},
        {"name": "logprob", "steps_per_nat": 0},
        {"name": "logprob", "steps_per_nat": 16, "more": 1},
    ],
)
def test_unknown_codecs_ask_for_an_upgrade(fields: dict[str, Any]) -> None:
    with pytest.raises(FormatVersionError, match=r"is unknown to this version; upgrade logitcache$"):
        codec_from_dict(fields)
