"""What a server says of a prompt, taken apart and checked; and what it says when it refuses."""

from __future__ import annotations

import datetime
import email.utils
import math
from typing import Any

import numpy as np
import pytest

from logitcache.teachers.server.answers import AnswerError, PromptLogprobs, VocabularyError
from logitcache.teachers.server.client import message_of, retry_after


def test_rows_are_ranked_and_cut() -> None:
    """The token that was sent is kept apart, whether it is one of the K or not."""
    rows = [{7: -9.0, 1: -2.0, 4: -0.2}, {1: -3.0, 2: -1.0}]
    found = PromptLogprobs.of(rows, [5, 7, 2], 2, 10)
    np.testing.assert_array_equal(found.ids, [[4, 1], [2, 1]])
    np.testing.assert_array_equal(found.logprobs, [[-0.2, -2.0], [-1.0, -3.0]])
    np.testing.assert_array_equal(found.sent, [-9.0, -1.0])
    assert found.spare


@pytest.mark.parametrize("zero", [-9999.0, -math.inf, -1e30])
def test_however_a_server_writes_log_0(zero: float) -> None:
    found = PromptLogprobs.of([{3: zero, 1: 0.0}], [5, 3], 1, 10)
    assert (found.ids.tolist(), found.sent.tolist()) == ([[1]], [-math.inf])


@pytest.mark.parametrize(
    ("rows", "position", "said"),
    [
        ([{2: -1.0, 3: -1.0}], None, "tells of 1 positions of 2"),
        ([{2: -1.0, 3: -1.0}, {4: -1.0, 5: -1.0}], 1, "does not know id 3, the token that was sent"),
        ([{2: -1.0}, {3: -1.0, 4: -2.0}], 0, "tells 1 of 2 entries"),
        ([{2: -1.0, 4: -2.0}, {3: -1.0, 4: math.nan}], 1, "says NaN"),
        ([{2: None, 4: -1.0}, {3: -1.0, 4: -2.0}], 0, "says NaN"),
        ([{2: -1.0, 4: -2.0}, {3: 0.5, 4: -2.0}], 1, "says numbers above 0"),
        ([{2: -1.0, 4: -2.0}, {3: -0.1, 4: -0.2}], 1, "more than all of the probability"),
    ],
)
def test_what_cannot_be_used(rows: list[dict[int, Any]], position: int | None, said: str) -> None:
    with pytest.raises(AnswerError, match=said) as caught:
        PromptLogprobs.of(rows, [1, 2, 3], 2, 10).check_known()
    assert caught.value.position == position


def test_a_row_with_a_number_that_is_unknown_is_unknown_whole() -> None:
    rows: list[dict[int, Any]] = [{2: -1.0, 4: None, 5: -0.7}, {3: -1.0, 4: -2.0}]
    found = PromptLogprobs.of(rows, [1, 2, 3], 2, 10)
    np.testing.assert_array_equal(found.unknown, [True, False])
    assert np.isnan(found.logprobs[0]).all()
    np.testing.assert_array_equal(found.sent, [math.nan, -1.0])
    np.testing.assert_array_equal(found.logprobs[1], [-1.0, -2.0])


@pytest.mark.parametrize("number", [10, -1])
def test_an_id_outside_the_vocabulary(number: int) -> None:
    with pytest.raises(VocabularyError, match="outside a vocabulary of 10"):
        PromptLogprobs.of([{2: -1.0, number: -1.5}], [1, 2], 1, 10)


def test_a_server_that_counts_the_sent_token_is_noticed() -> None:
    """Two rows of exactly K in which that token is the last; a third entry somewhere shows that it is no rule."""
    rows = [{2: -5.0, 4: -1.0}, {3: -5.0, 4: -1.0}]
    assert PromptLogprobs.of(rows, [1, 2, 3], 2, 10).counts_the_sent
    assert not PromptLogprobs.of([rows[0], {**rows[1], 6: -6.0}], [1, 2, 3], 2, 10).counts_the_sent
    assert not PromptLogprobs.of([rows[0], {3: -1.0, 4: -5.0}], [1, 2, 3], 2, 10).counts_the_sent


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"error": {"message": "no", "code": 400}}, "no"),
        ({"error": "Unauthorized"}, "Unauthorized"),
        ({"object": "error", "message": "no"}, "no"),
        ({"detail": [{"loc": ["body"]}]}, '[{"loc": ["body"]}]'),
        ("plain", "plain"),
        ({}, "{}"),
    ],
)
def test_the_words_of_servers(document: Any, said: str) -> None:
    assert message_of(document) == said


def test_retry_after() -> None:
    soon = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1), usegmt=True)
    assert retry_after("7") == 7
    assert 3000 < (retry_after(soon) or 0) <= 3600
    assert [retry_after(header) for header in (None, "", "soon", "1e3")] == [None] * 4
