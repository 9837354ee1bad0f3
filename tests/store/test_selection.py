"""The stored form of selections, and what caches say of their rows because of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from logitcache.codec import RowCodec
from logitcache.errors import FormatVersionError
from logitcache.selection import Selection
from logitcache.store import Cache, StoredSelection, open_cache
from tests.store.caches import make_cache

# text, stored form, unbiased, has_exact_head
FORMS = [
    ("top-k:9", {"method": "top-k", "size": 9, "mass": None, "exponent": None}, False, True),
    ("top-p:0.9:9", {"method": "top-p", "size": 9, "mass": 0.9, "exponent": None}, False, True),
    ("sample:9", {"method": "sample", "size": 9, "mass": None, "exponent": None}, True, False),
    ("sample:9:0.8", {"method": "sample", "size": 9, "mass": None, "exponent": 0.8}, True, False),
    ("varopt:9", {"method": "varopt", "size": 9, "mass": None, "exponent": None}, True, True),
]


@pytest.mark.parametrize(("text", "fields", "unbiased", "head"), FORMS)
def test_stored_form(text: str, fields: dict[str, object], unbiased: bool, head: bool) -> None:
    """Literally: fingerprints of existing caches are hashes of these."""
    selection = Selection.parse(text)
    stored = StoredSelection(**selection.to_dict())
    assert stored.model_dump(mode="json") == fields
    assert StoredSelection.model_validate(fields) == stored
    assert Selection.from_dict(fields) == selection
    assert (stored.unbiased, stored.has_exact_head) == (unbiased, head)
    assert selection.unbiased == unbiased


@pytest.mark.parametrize("exponent", [0.0, -1.0, 4.5, float("nan"), "1"])
def test_exponents_that_are_refused(exponent: object) -> None:
    with pytest.raises(ValidationError):
        StoredSelection(method="sample", size=9, exponent=exponent)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "size", "mass"),
    [("top-k", 0, None), ("label", 1, None), ("top-k", 65_536, None), ("top-k", 9, 0.5), ("top-p", 9, None)]
    + [("top-p", 9, mass) for mass in (0.0, 1.5, float("nan"))],
)
def test_parameters_that_are_refused(method: Any, size: int, mass: float | None) -> None:
    with pytest.raises(ValidationError, match=r"write|choose"):
        StoredSelection(method=method, size=size, mass=mass)


@pytest.mark.parametrize(("text", "unbiased", "head"), [(form[0], *form[2:]) for form in FORMS])
def test_what_a_cache_says_of_its_rows(text: str, unbiased: bool, head: bool, tmp_path: Path) -> None:
    made = open_cache(make_cache(tmp_path / "cache", "counts").root)
    selection = StoredSelection(**Selection.parse(text).to_dict())
    codec = RowCodec.for_selection(selection.method, selection.size, selection.exponent, "small").to_dict()
    identity = made.manifest.identity.model_copy(update={"selection": selection, "codec": codec})
    cache = Cache(made.root, made.manifest.model_copy(update={"identity": identity}))
    assert (cache.unbiased, cache.has_exact_head) == (unbiased, head)


@pytest.mark.parametrize("text", ["top-k:9", "sample:8", "sample:9:0.8", "varopt:9"])
def test_a_selection_with_another_ones_codec_is_refused(text: str, tmp_path: Path) -> None:
    """Rows of `sample:9` must not pass for exact probabilities or for draws of another number."""
    made = open_cache(make_cache(tmp_path / "cache", "counts", units=range(1)).root, partial=True)
    selection = StoredSelection(**Selection.parse(text).to_dict())
    identity = made.manifest.identity.model_copy(update={"selection": selection})
    with pytest.raises(FormatVersionError, match=rf"stores selection {text[:6]}.* unknown to this version; upgrade"):
        Cache(made.root, made.manifest.model_copy(update={"identity": identity}))
