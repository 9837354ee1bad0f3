"""The `--select` argument."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.errors import UsageError
from logitcache.selection import Selection

specs = st.one_of(
    st.builds(Selection, st.sampled_from(["top-k", "sample"]), st.integers(1, 65_535)),
    st.builds(Selection, st.just("top-p"), st.integers(1, 65_535), st.floats(0, 1, exclude_min=True)),
)


def test_spellings() -> None:
    assert Selection.parse("top-k:64") == Selection("top-k", 64)
    assert Selection.parse(" Top-P:0.95:100\n") == Selection("top-p", 100, 0.95)
    assert Selection.parse("top-p:1:65535") == Selection("top-p", 65_535, 1.0)
    assert Selection.parse("sample:1") == Selection("sample", 1)
    assert [str(Selection.parse(text)) for text in ("top-k:64", "top-p:0.95:100", "sample:50")] == [
        "top-k:64",
        "top-p:0.95:100",
        "sample:50",
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(specs)
def test_text_and_json_round_trip(selection: Selection) -> None:
    assert Selection.parse(str(selection)) == selection
    assert Selection.from_dict(json.loads(json.dumps(selection.to_dict()))) == selection


def test_what_follows_from_the_method() -> None:
    facts = {text: Selection.parse(text) for text in ("top-k:9", "top-p:0.5:9", "sample:9")}
    assert {text: (one.unbiased, one.draws) for text, one in facts.items()} == {
        "top-k:9": (False, 0),
        "top-p:0.5:9": (False, 0),
        "sample:9": (True, 9),
    }


UNKNOWN = """
top-k top-k: top-k:x top-k:1.5 top-k:1:2 top-p:0.9 top-p:9 top-p:0.9: top-p:x:3 top-p:0.9:3:4
sample: sample:0.5:9 best:3 :3 64 varopt:12
"""


@pytest.mark.parametrize("text", ["", *UNKNOWN.split()])
def test_what_is_not_understood(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not understood; write top-k:64, top-p:0.95:100 or sample:50$") as caught:
        Selection.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["top-k:0", "top-k:-3", "top-k:65536", "sample:0", "sample:65536", "top-p:0.5:0"])
def test_sizes_out_of_range(text: str) -> None:
    with pytest.raises(UsageError, match=r"entries a row; choose 1 to 65535$"):
        Selection.parse(text)


@pytest.mark.parametrize("mass", ["0", "-0.5", "1.0001", "nan", "inf", "-inf"])
def test_masses_out_of_range(mass: str) -> None:
    with pytest.raises(UsageError, match=rf"^top-p mass {float(mass)} is outside \(0, 1\]; write"):
        Selection.parse(f"top-p:{mass}:10")


def test_fields_that_do_not_belong_together() -> None:
    for arguments in (("top-k", 5, 0.5), ("sample", 5, 0.5), ("top-p", 5)):
        with pytest.raises(UsageError, match=r"is spelled otherwise"):
            Selection(*arguments)
    with pytest.raises(UsageError, match=r"^selection method 'best' is unknown"):
        Selection("best", 5)


def test_more_ids_than_the_vocabulary_has() -> None:
    for text in ("top-k:301", "top-p:0.9:301"):
        Selection.parse(text).check_vocabulary(301)
        with pytest.raises(UsageError, match=r"keeps 301 ids, but the teacher's vocabulary has 300$"):
            Selection.parse(text).check_vocabulary(300)
    Selection.parse("sample:301").check_vocabulary(300)
