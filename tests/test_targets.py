"""SparseTargets: what it refuses, and that cutting, joining and padding lose nothing."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.errors import TargetsError
from logitcache.targets import SparseTargets
from tests.codec.rows import COLUMNS, assert_equal, count_rows, generators, probability_rows

GOOD: dict[str, Any] = {"offsets": [0, 2, 2, 3], "ids": [1, 4, 0], "weights": [0.5, 0.25, 1.0]}
many = settings(max_examples=40, deadline=None, derandomize=True)


def rows_of(rng: np.random.Generator, rows: int, unbiased: bool) -> SparseTargets:
    return count_rows(rng, rows, 50, 6) if unbiased else probability_rows(rng, rows, 50, 9)


def test_defaults() -> None:
    biased = SparseTargets(**GOOD)
    np.testing.assert_array_equal(biased.tail_mass, np.float32([0.25, 1, 0]))
    np.testing.assert_array_equal(biased.threshold, [0, 0, 0])
    assert np.isnan(biased.label_logprob).all()
    assert np.isnan(biased.entropy).all()
    unbiased = SparseTargets(**GOOD, unbiased=True)
    np.testing.assert_array_equal(unbiased.tail_mass, [0, 0, 0])
    np.testing.assert_array_equal(unbiased.threshold, [np.inf] * 3)
    assert (len(biased), repr(biased)) == (3, "SparseTargets(3 rows, 3 entries, unbiased=False)")
    np.testing.assert_array_equal(biased.row_lengths, [2, 0, 1])
    np.testing.assert_array_equal(biased.row_index(), [0, 0, 2])
    np.testing.assert_array_equal(biased.row_sums(), [0.75, 0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": []}, r"^offsets must be one-dimensional, hold N \+ 1 numbers and begin with 0$"),
        ({"offsets": [[0, 3]]}, "^offsets must be one-dimensional"),
        ({"offsets": [1, 2, 2, 3]}, "begin with 0$"),
        ({"offsets": [0, 2, 1, 3]}, "^offsets fall after row 1;"),
        ({"offsets": [0.0, 2.0, 2.0, 3.0]}, "^offsets must be integers, not float64$"),
        ({"offsets": [0, 2, 2, 4]}, r"^ids has shape \(3,\), but offsets end at 4;"),
        ({"weights": [0.5, 0.25]}, r"^weights has shape \(2,\), but offsets end at 3;"),
        ({"weights": [[0.5, 0.25, 1.0]]}, r"^weights has shape \(1, 3\)"),
        ({"ids": [1.0, 4.0, 0.0]}, "^ids must be integers, not float64$"),
        ({"ids": [True, False, True]}, "^ids must be integers, not bool$"),
        ({"ids": [1, 4, -2]}, r"^row 2 has a negative token id \(entry 2, id -2\)$"),
        ({"ids": np.array([1, 2**63, 0], dtype=np.uint64)}, "^row 0 has a negative token id"),
        ({"ids": [4, 1, 0]}, r"^row 0 has ids that are not ascending and unique \(entry 1, id 1\)$"),
        ({"ids": [4, 4, 0]}, "^row 0 has ids that are not ascending and unique"),
        ({"weights": [0.5, 0.25, np.nan]}, r"^row 2 has a weight that is not finite \(entry 2, id 0\)$"),
        ({"weights": [0.5, np.inf, 0]}, "^row 0 has a weight that is not finite"),
        ({"weights": [0.5, -0.25, 0]}, r"^row 0 has a negative weight \(entry 1, id 4\)$"),
        ({"weights": [0.5, 0.25, 1.01]}, "^row 2's probabilities and tail mass sum to 1.01"),
        ({"tail_mass": [0.25, 0.5, 0.2]}, "^row 2's probabilities and tail mass sum to 1.2"),
        ({"tail_mass": [0.25, -0.1, 0]}, "^row 1 has tail mass -0.1"),
        ({"tail_mass": [0.25, np.nan, 0]}, "^row 1 has tail mass nan"),
        ({"tail_mass": [0.25, 1.5, 0]}, "^row 1 has tail mass 1.5"),
        ({"tail_mass": [0.25]}, r"^tail_mass has shape \(1,\), but there are 3 rows$"),
        ({"label_logprob": [0.0] * 4}, r"^label_logprob has shape \(4,\)"),
        ({"entropy": np.zeros((3, 1))}, r"^entropy has shape \(3, 1\)"),
        ({"threshold": 0.5}, r"^threshold has shape \(1,\), but there are 3 rows$"),
    ],
)
def test_broken_invariants_are_refused(change: dict[str, Any], message: str) -> None:
    SparseTargets(**GOOD)
    with pytest.raises(TargetsError, match=message):
        SparseTargets(**{**GOOD, **change})


def test_sampled_rows_may_sum_to_anything_but_not_hold_bad_mass() -> None:
    assert SparseTargets([0, 2], [3, 4], [1.0, 0.5], unbiased=True).row_sums()[0] == 1.5
    with pytest.raises(TargetsError, match=r"^row 0 has tail mass 2"):
        SparseTargets([0, 1], [3], [1.0], tail_mass=[2.0], unbiased=True)


def test_order_is_only_asked_within_a_row() -> None:
    """Ids may fall between rows, also across empty ones at the start, in the middle and at the end."""
    targets = SparseTargets([0, 0, 2, 2, 2, 4, 4], [8, 9, 0, 1], [0.1, 0.1, 0.2, 0.2])
    np.testing.assert_array_equal(targets.row_lengths, [0, 2, 0, 0, 2, 0])
    with pytest.raises(TargetsError, match=r"^row 4 has ids that are not ascending"):
        SparseTargets([0, 0, 2, 2, 2, 4, 4], [8, 9, 1, 0], [0.1, 0.1, 0.2, 0.2])


def test_vocabulary() -> None:
    targets = SparseTargets(**GOOD)
    targets.check_vocabulary(5)
    with pytest.raises(TargetsError, match=r"^row 0 holds token id 4, but the vocabulary has 4 ids;"):
        targets.check_vocabulary(4)
    SparseTargets([0, 0], [], []).check_vocabulary(1)


def test_with_columns() -> None:
    targets = SparseTargets(**GOOD)
    told = targets.with_columns(label_logprob=[-1, np.nan, -2], entropy=[1, 2, 3])
    np.testing.assert_array_equal(told.label_logprob, np.float32([-1, np.nan, -2]))
    np.testing.assert_array_equal(told.entropy, np.float32([1, 2, 3]))
    assert told.label_logprob.dtype == np.float32
    assert np.isnan(targets.entropy).all()
    assert_equal(told.with_columns(targets.label_logprob, targets.entropy), targets)
    with pytest.raises(TargetsError, match=r"^entropy has shape \(2,\), but there are 3 rows$"):
        targets.with_columns(label_logprob=[0, 0, 0], entropy=[1, 2])


@many
@given(generators, st.integers(0, 12), st.booleans(), st.data())
def test_pieces_join_to_the_whole(rng: np.random.Generator, rows: int, unbiased: bool, data: st.DataObject) -> None:
    targets = rows_of(rng, rows, unbiased)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=4)))
    edges = [0, *cuts, rows]
    parts = [targets.slice(start, stop) for start, stop in itertools.pairwise(edges)]
    assert [len(part) for part in parts] == list(np.diff(edges))
    assert_equal(SparseTargets.concatenate(parts), targets)
    for part in parts:
        fields = {name: getattr(part, name) for name in ("offsets", "ids", "weights", *COLUMNS)}
        assert_equal(SparseTargets(**fields, unbiased=unbiased), part)


@many
@given(generators, st.integers(0, 12), st.booleans())
def test_the_padded_view_holds_the_rows(rng: np.random.Generator, rows: int, unbiased: bool) -> None:
    targets = rows_of(rng, rows, unbiased)
    ids, weights = targets.padded()
    assert ids.shape == weights.shape == (rows, max(1, targets.row_lengths.max(initial=0)))
    for row in range(rows):
        one = targets.slice(row, row + 1)
        length = one.ids.size
        np.testing.assert_array_equal(ids[row, :length], one.ids)
        np.testing.assert_array_equal(weights[row, :length], one.weights)
        assert (ids[row, length:] == -1).all()
        assert (weights[row, length:] == 0).all()


@many
@given(generators, st.integers(0, 12), st.booleans())
def test_the_device_view_is_the_padded_view(rng: np.random.Generator, rows: int, unbiased: bool) -> None:
    targets = rows_of(rng, rows, unbiased)
    device = targets.to_device("cpu")
    ids, weights = targets.padded()
    assert (len(device), device.unbiased) == (rows, unbiased)
    assert (device.ids.dtype, device.weights.dtype) == (torch.int64, torch.float32)
    np.testing.assert_array_equal(device.ids.numpy(), ids)
    np.testing.assert_array_equal(device.weights.numpy(), weights)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(device, name).numpy(), getattr(targets, name))


def test_pieces_that_do_not_fit() -> None:
    targets = SparseTargets(**GOOD)
    for start, stop in ((0, 4), (-1, 2), (2, 1)):
        with pytest.raises(TargetsError, match=rf"^rows \[{start}, {stop}\) are outside these targets, which have 3"):
            targets.slice(start, stop)
    with pytest.raises(TargetsError, match=r"^there is nothing to concatenate"):
        SparseTargets.concatenate([])
    with pytest.raises(TargetsError, match=r"^biased and unbiased targets cannot be concatenated"):
        SparseTargets.concatenate([targets, SparseTargets(**GOOD, unbiased=True)])


def test_pickling() -> None:
    targets = SparseTargets(**GOOD)
    assert_equal(pickle.loads(pickle.dumps(targets)), targets)
