"""The `--select` argument."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.errors import UsageError
from logitcache.selection import Selection

specs = st.one_of(
    st.builds(Selection, st.sampled_from(["top-k", "sample", "varopt"]), st.integers(1, 65_535)),
    st.builds(
        Selection, st.just("sample"), st.integers(1, 65_535), exponent=st.floats(0, 4, exclude_min=True, width=32)
    ),
    st.builds(Selection, st.just("top-p"), st.integers(1, 65_535), st.floats(0, 1, exclude_min=True)),
    st.just(Selection("label", 0)),
)


def test_spellings() -> None:
    assert Selection.parse("top-k:64") == Selection("top-k", 64)
    assert Selection.parse(" Top-P:0.95:100\n") == Selection("top-p", 100, 0.95)
    assert Selection.parse("top-p:1:65535") == Selection("top-p", 65_535, 1.0)
    assert Selection.parse("sample:1") == Selection("sample", 1)
    assert Selection.parse("sample:50:.8") == Selection("sample", 50, exponent=0.8)
    assert Selection.parse("varopt:12") == Selection("varopt", 12)
    assert Selection.parse("label") == Selection("label", 0)
    for text in ("top-k:64", "top-p:0.95:100", "sample:50", "sample:50:0.8", "varopt:12", "label"):
        assert str(Selection.parse(text)) == text


def test_an_exponent_of_one_is_plain_sampling() -> None:
    """The same value, text and stored fields as `sample:50`, so the same cache."""
    for one in (Selection.parse("sample:50:1"), Selection.parse("sample:50:1.0"), Selection("sample", 50, exponent=1)):
        assert one == Selection("sample", 50)
        assert str(one) == "sample:50"
        assert one.to_dict() == {"method": "sample", "size": 50, "mass": None}
    assert Selection.parse("sample:50:2").to_dict() == {"method": "sample", "size": 50, "mass": None, "exponent": 2.0}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(specs)
def test_text_and_json_round_trip(selection: Selection) -> None:
    assert Selection.parse(str(selection)) == selection
    assert Selection.from_dict(json.loads(json.dumps(selection.to_dict()))) == selection


def test_what_follows_from_the_method() -> None:
    texts = ("top-k:9", "top-p:0.5:9", "sample:9", "sample:9:0.5", "varopt:9", "label")
    facts = {text: Selection.parse(text) for text in texts}
    assert {text: (one.unbiased, one.draws) for text, one in facts.items()} == {
        "top-k:9": (False, 0),
        "top-p:0.5:9": (False, 0),
        "sample:9": (True, 9),
        "sample:9:0.5": (True, 9),
        "varopt:9": (True, 1),
        "label": (False, 0),
    }


UNKNOWN = """
top-k top-k: top-k:x top-k:1.5 top-k:1:2 top-p:0.9 top-p:9 top-p:0.9: top-p:x:3 top-p:0.9:3:4
sample: sample:0.5:9 sample:9: sample:9:x sample:9:1:2 best:3 :3 64 varopt: varopt:x varopt:12:0.5
label: label:0 label:1 labels
"""


@pytest.mark.parametrize("text", ["", *UNKNOWN.split()])
def test_what_is_not_understood(text: str) -> None:
    forms = "top-k:64, top-p:0.95:100, sample:50, sample:50:0.8, varopt:12 or label"
    with pytest.raises(UsageError, match=f"is not understood; write {forms}$") as caught:
        Selection.parse(text)
    assert repr(text) in str(caught.value)


SIZES = "top-k:0 top-k:-3 top-k:65536 sample:0 sample:65536 sample:0:0.5 top-p:0.5:0 varopt:0 varopt:65536"


@pytest.mark.parametrize("text", SIZES.split())
def test_sizes_out_of_range(text: str) -> None:
    with pytest.raises(UsageError, match=r"entries a row; choose 1 to 65535$"):
        Selection.parse(text)


@pytest.mark.parametrize("mass", ["0", "-0.5", "1.0001", "nan", "inf", "-inf"])
def test_masses_out_of_range(mass: str) -> None:
    with pytest.raises(UsageError, match=rf"^top-p mass {float(mass)} is outside \(0, 1\]; write"):
        Selection.parse(f"top-p:{mass}:10")


@pytest.mark.parametrize("exponent", ["0", "-0.5", "4.5", "nan", "inf", "-inf"])
def test_exponents_out_of_range(exponent: str) -> None:
    with pytest.raises(UsageError, match=rf"^sample exponent {float(exponent)} is outside \(0, 4\]; write"):
        Selection.parse(f"sample:50:{exponent}")


def test_fields_that_do_not_belong_together() -> None:
    for arguments in (("top-k", 5, 0.5), ("sample", 5, 0.5), ("top-p", 5)):
        with pytest.raises(UsageError, match=r"is spelled otherwise"):
            Selection(*arguments)
    for method, mass in (("top-k", None), ("top-p", 0.5), ("varopt", None)):
        with pytest.raises(UsageError, match=rf"^selection {method} has no exponent; write"):
            Selection(method, 5, mass, exponent=0.5)
    with pytest.raises(UsageError, match=r"^selection method 'best' is unknown"):
        Selection("best", 5)


def test_more_ids_than_the_vocabulary_has() -> None:
    for text in ("top-k:301", "top-p:0.9:301", "varopt:301"):
        Selection.parse(text).check_vocabulary(301)
        with pytest.raises(UsageError, match=r"keeps 301 ids, but the teacher's vocabulary has 300; keep fewer$"):
            Selection.parse(text).check_vocabulary(300)
    Selection.parse("sample:301").check_vocabulary(300)
