"""Planes with one number changed: both readers refuse them, or both read the same rows.

So the rules of FORMAT.md about what a reader refuses are those that logitcache follows, no more and no less.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from logitcache.codec import Codebook, LayoutName, Planes, RowCodec
from logitcache.errors import DamagedCacheError
from tests.format.check import check_contents
from tests.format.reader import Contents, FormatError, Tables, _read_chunk
from tests.golden.make import SELECTIONS, columns_of
from tests.golden.rows import VOCABULARY, rows_of, tokens_of

ROWS = 14
NUMBERS = (0, 1, 2, 3, 6, 63, 119, 120, 240, 241, 1020, 1264, 1265, 2050, 4098, 4099, 65_535, 65_536, 129_008, 129_009,
           1 << 40, (1 << 63) - 1)  # fmt: skip
SELECTED = ["sample", "top-k", "sample-exponent", "varopt", "label"]


@pytest.mark.parametrize(
    ("name", "layout", "masked"),
    [*itertools.product(SELECTED, ["small", "fast"], [False]), *itertools.product(SELECTED, ["small"], [True])],
)
def test_both_readers_refuse_the_same(name: str, layout: LayoutName, masked: bool) -> None:
    fields = SELECTIONS[name]
    codec = RowCodec.for_selection(fields["method"], fields["size"], fields.get("exponent"), layout, masked)
    tokens = tokens_of(ROWS, 3)
    targets = rows_of(codec.values.name, tokens, 3)
    tables = Codebook.from_pilot(tokens, targets, VOCABULARY, codec.needs_contexts)
    theirs = Tables(dict(tables.to_planes()), VOCABULARY)
    uniforms = np.random.default_rng(0).random
    counted = np.arange(ROWS) % 5 > 1 if masked else None
    planes = {"tokens": tables.ranks.encode(tokens), **codec.encode(tokens, targets, tables, uniforms, counted)}
    assert _both(planes, codec, tables, theirs)
    seen = [0, 0]
    for plane, index, number in _changes(planes):
        changed = planes[plane].copy()
        changed[index] = number
        seen[_both({**planes, plane: changed}, codec, tables, theirs)] += 1
    assert min(seen) > 20


def _changes(planes: Planes) -> list[tuple[str, int, int]]:
    """Every plane's first and last number, and about a dozen between."""
    return [
        (name, index, number)
        for name, plane in planes.items()
        for index in sorted({*range(0, plane.size, 1 + plane.size // 12), plane.size - 1})
        for number in NUMBERS
    ]


def _both(planes: Planes, codec: RowCodec, tables: Codebook, theirs: Tables) -> bool:
    """Whether the planes are read; raises AssertionError where the readers differ."""
    ours: dict[str, list[Any]] | None
    other: Contents | None = Contents()
    try:
        tokens = tables.ranks.decode(planes["tokens"])
        rest = {name: plane for name, plane in planes.items() if name != "tokens"}
        ours = {"blocks": [0] * ROWS, "tokens": tokens.tolist(), **columns_of(codec.decode(tokens, rest, tables))}
        ours |= {"counted": planes["counted"].tolist()} if codec.masked else {}
    except DamagedCacheError:
        ours = None
    try:
        _read_chunk(planes, ROWS, codec.to_dict(), theirs, other)
        other.blocks = [0] * ROWS
    except FormatError:
        other = None
    assert (ours is None) == (other is None)
    if ours is None or other is None:
        return False
    check_contents(other, ours)
    return True
