"""The DistillKit layout against hand-built bytes, documented sizes and its own error bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from logitcache.errors import TargetsError
from logitcache.interchange import DistillKitLayout
from logitcache.interchange.distillkit import ResidualBin
from tests.interchange.captures import FIELDS, VOCABULARY, position


def rows(seed: int, count: int, k: int, vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Distinct random ids and falling log-probabilities of a softmax."""
    rng = np.random.default_rng(seed)
    logits = np.sort(rng.normal(size=(count, k + 10)) * rng.gamma(2.0, size=(count, 1)), axis=1)[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.stack([rng.choice(vocab_size, k, replace=False) for _ in range(count)])
    return ids, logprobs[:, :k]


def layout(**changes: Any) -> DistillKitLayout:
    return DistillKitLayout(**{**FIELDS, **changes})


def test_hand_built_bytes_decode() -> None:
    made = [position(number) for number in range(40)]
    packed = np.array([list(one[2]) for one in made], dtype=np.uint8)
    ids = np.array([list(one[3]) for one in made], dtype=np.uint8)
    mine = layout()
    assert (packed.shape[1], ids.shape[1]) == (mine.logprob_bytes, mine.id_bytes)
    np.testing.assert_array_equal(mine.decode_ids(ids), [one[0] for one in made])
    np.testing.assert_allclose(mine.decode_logprobs(packed), [one[1] for one in made], rtol=0, atol=1e-12)


def test_documented_sizes() -> None:
    """README of DistillKit: about 300 bytes a token recommended, around 114 with the budget pick."""
    recommended, budget = DistillKitLayout.recommended(1 << 16), DistillKitLayout.budget(1 << 16)
    assert (recommended.k, recommended.bytes_per_token) == (128, 128 * 2 + 16 * 2 + 6 * 4)
    assert (budget.k, budget.bytes_per_token) == (50, 114)
    assert DistillKitLayout.budget((1 << 16) + 1).id_bytes == 107  # 50 ids of 17 bits


@pytest.mark.parametrize("vocab_size", [2, 255, 256, 257, 128_256, 1 << 32])
def test_id_bits(vocab_size: int) -> None:
    mine = DistillKitLayout(d=vocab_size, k=2, exact_k=2, residual_bins=())
    assert 2 ** (mine.id_bits - 1) < vocab_size <= 2**mine.id_bits
    ids = np.array([[vocab_size - 1, 0]])
    np.testing.assert_array_equal(mine.decode_ids(mine.encode_ids(ids)), ids)
    with pytest.raises(TargetsError, match=f"token id {vocab_size}, outside the vocabulary of {vocab_size} ids"):
        mine.encode_ids(np.array([[0, vocab_size]]))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    exact_k=st.integers(0, 12),
    exact_dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    term_dtype=st.sampled_from(["float32", "float64"]),
    normalize_t=st.booleans(),
    delta_encoding=st.booleans(),
    bits=st.integers(2, 20),
)
def test_residuals_bound_the_error(seed: int, bits: int, exact_k: int, delta_encoding: bool, **rest: Any) -> None:
    """Every value is corrected: it is off by a step of the largest residual, whatever the polynomial does."""
    bins = [{"scale_dtype": "float32", "element_bits": bits, "num_elements": 20 - exact_k}]
    mine = layout(k=20, exact_k=exact_k, residual_bins=bins, delta_encoding=delta_encoding, **rest)
    ids, logprobs = rows(seed, 30, 20, VOCABULARY)
    np.testing.assert_array_equal(mine.decode_ids(mine.encode_ids(ids)), ids)
    decoded = mine.decode_logprobs(mine.encode_logprobs(logprobs))
    plain = mine.model_copy(update={"residual_bins": ()})
    stored = np.diff(logprobs, axis=1, prepend=0.0) if delta_encoding else logprobs
    rough = plain.decode_logprobs(plain.encode_logprobs(logprobs))
    rough = np.diff(rough, axis=1, prepend=0.0) if delta_encoding else rough
    step = np.abs(stored - rough)[:, exact_k:].max(axis=1, keepdims=True) / 2 ** (bits - 1)
    precision = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(rest["exact_dtype"], 2.0**-23)
    bound = np.concatenate([np.abs(stored[:, :exact_k]) * precision, np.repeat(step, 20 - exact_k, axis=1)], axis=1)
    bound = np.cumsum(bound, axis=1) if delta_encoding else bound
    assert (np.abs(decoded - logprobs) <= bound * 1.001 + 1e-4).all()


def test_polynomial_is_the_least_squares_fit() -> None:
    mine = layout(k=30, exact_k=5, residual_bins=[], term_dtype="float64")
    _, logprobs = rows(3, 20, 30, VOCABULARY)
    approximated = mine.decode_logprobs(mine.encode_logprobs(logprobs))[:, 5:]
    places = np.arange(25.0)
    design = np.stack([np.ones(25), places, np.sqrt(places)], axis=1)
    expected = (design @ np.linalg.lstsq(design, logprobs[:, 5:].T, rcond=None)[0]).T
    np.testing.assert_allclose(approximated, expected, atol=1e-9)


def test_a_polynomial_is_stored_whole() -> None:
    """Values that are a polynomial come back to the precision of the coefficients."""
    mine = layout(k=40, exact_k=0, residual_bins=[], polynomial_terms=[0, 1, 2, "sqrt", "exp"], normalize_t=True)
    place = np.linspace(0, 1, 40)
    values = (-1.0 - 2 * place - place**2 - 0.5 * np.sqrt(place) - 0.25 * np.exp(place))[None]
    np.testing.assert_allclose(mine.decode_logprobs(mine.encode_logprobs(values)), values, atol=1e-5)


def test_one_bit_residuals() -> None:
    """One bit is a sign: plus or minus the largest residual."""
    part = ResidualBin(scale_dtype="float32", element_bits=1, num_elements=3)
    np.testing.assert_array_equal(part.decode(part.encode(np.array([[0.5, -0.25, 0.125]]))), [[0.5, -0.5, 0.5]])
    assert part.num_bytes == 5


def test_residuals_of_zero() -> None:
    part = ResidualBin(scale_dtype="float16", element_bits=8, num_elements=4)
    np.testing.assert_array_equal(part.decode(part.encode(np.zeros((2, 4)))), np.zeros((2, 4)))
    # A scale too small for float16 becomes 0, and so do the residuals.
    np.testing.assert_array_equal(part.decode(part.encode(np.full((1, 4), 1e-12))), np.zeros((1, 4)))


@pytest.mark.parametrize(
    "values", [[-1.0, -0.5, -2, -3, -4], [0.5, -1, -2, -3, -4], [-1, -2, -3, -4, -np.inf], [np.nan, -1, -2, -3, -4]]
)
def test_what_is_no_row_of_logprobs_is_refused(values: list[float]) -> None:
    good = [-1.0, -2, -3, -4, -5]
    with pytest.raises(TargetsError, match="row 1 has log-probability"):
        layout().encode_logprobs(np.array([good, values]))


def test_wrong_shapes_are_refused() -> None:
    mine = layout()
    for call in (mine.encode_ids, mine.encode_logprobs):
        with pytest.raises(TargetsError, match="stores 5 of each position"):
            call(np.zeros((3, 4), dtype=np.int64))
    for call in (mine.decode_ids, mine.decode_logprobs):
        with pytest.raises(TargetsError, match="bytes a position"):
            call(np.zeros((3, 4), dtype=np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exact_k": 6}, "exact_k is 6, above k"),
        ({"d": 4}, "above the vocabulary"),
        ({"polynomial_terms": None, "residual_bins": []}, "must say what the others are"),
        ({"residual_bins": [{"scale_dtype": "float16", "element_bits": 3, "num_elements": 4}]}, "cover 4 values"),
        ({"polynomial_terms": ["log"]}, "polynomial_terms"),
        ({"exact_dtype": "float8"}, "exact_dtype"),
        ({"colour": 1}, "colour"),
    ],
)
def test_layouts_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        layout(**changes)
