"""Context keys: small where the pilot expected an id, and always reversible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.codec import Codebook, ContextTable, FrequencyRanks
from logitcache.errors import DamagedCacheError, TargetsError
from logitcache.targets import SparseTargets

TOKENS = np.array([4, 4, 4, 8])
ROWS = np.array([0, 0, 1, 1, 2, 3, 3])
IDS = np.array([1, 5, 5, 9, 1, 1, 9])
RANKS = FrequencyRanks(12, np.array([1, 5, 9]))


def test_keys_follow_the_pilot() -> None:
    """After 4, ids 1 and 5 were stored twice; 9 once, which is too little to be a candidate."""
    table = ContextTable.from_pilot(RANKS, TOKENS, ROWS, IDS)
    assert (table.tokens.tolist(), table.candidates.tolist()) == ([4], [1, 5])
    ids = np.array([1, 5, 9, 0, 7])
    keys = table.encode(np.array([4]), np.array([7]), np.zeros(5, dtype=np.int64), ids)
    assert keys.tolist() == [1, 2, 3 + 2, 3 + 3, 0], "candidates, then ranks after them; the next token is 0"
    assert table.encode(np.array([8]), np.array([-1]), np.zeros(5, dtype=np.int64), ids).tolist() == [1, 2, 3, 4, 9], (
        "no candidates after 8"
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 50, 2**18 + 5, 2**32]), st.integers(0, 300))
def test_round_trips(seed: int, vocab_size: int, entries: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.zipf(1.5, 40) % vocab_size
    rows, ids = rng.integers(0, 40, entries), rng.zipf(1.3, entries) % vocab_size
    ranks = FrequencyRanks.from_ids(ids, vocab_size)
    table = ContextTable.from_pilot(ranks, tokens, rows, ids)
    planes = table.to_planes()
    again = ContextTable.from_planes(ranks, planes["context_sizes"], planes["candidates"])
    for name in ("tokens", "starts", "candidates"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    following = np.append(tokens[1:], -1)
    wanted = np.append(ids, following[rows[following[rows] >= 0]])
    of_rows = np.append(rows, rows[following[rows] >= 0])
    keys = again.encode(tokens, following, of_rows, wanted)
    assert keys.min(initial=0) >= 0
    np.testing.assert_array_equal(again.decode(tokens[of_rows], following[of_rows], keys[None])[0], wanted)


def test_keys_that_stand_for_nothing() -> None:
    table = ContextTable.from_pilot(RANKS, TOKENS, ROWS, IDS)
    with pytest.raises(DamagedCacheError, match=r"^an entry stands for the next token where there is none$"):
        table.decode(np.array([4]), np.array([-1]), np.array([[0]]))
    with pytest.raises(DamagedCacheError, match=r"^a stored id rank is outside the vocabulary of 12 ids$"):
        table.decode(np.array([4]), np.array([7]), np.array([[15]]))


@pytest.mark.parametrize(
    ("sizes", "candidates"),
    [([2], [1]), ([1], [1, 2]), ([1] * 13, [1] * 13), ([1 << 40], [1]), ([1], [12])],
)
def test_damaged_tables(sizes: list[int], candidates: list[int]) -> None:
    planes = {"ids": np.array([1]), "context_sizes": np.array(sizes), "candidates": np.array(candidates)}
    with pytest.raises(DamagedCacheError):
        Codebook.from_planes(planes, 12)


def test_a_codebook_lacks_a_table() -> None:
    with pytest.raises(DamagedCacheError, match=r"^the codebook lacks 'candidates'$"):
        Codebook.from_planes({"ids": np.array([1]), "context_sizes": np.array([0])}, 12)


def test_a_pilot_outside_the_vocabulary() -> None:
    targets = SparseTargets([0, 1], [3], [0.5])
    for tokens, message in (([12], "^token id 12 is outside"), ([-1], "^token id -1 is outside")):
        with pytest.raises(TargetsError, match=message):
            Codebook.from_pilot(np.array(tokens), targets, 12, with_contexts=True)
    with pytest.raises(TargetsError, match=r"^row 0 holds token id 3, but the vocabulary has 2 ids"):
        Codebook.from_pilot(np.array([1]), targets, 2, with_contexts=True)
