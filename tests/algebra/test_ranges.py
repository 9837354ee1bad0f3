"""Lists of block ranges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.algebra import BlockRanges
from logitcache.algebra.ranges import spell
from logitcache.errors import UsageError


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("0:3,5,8:", [0, 1, 2, 5, 8, 9]),
        ("7:9, 2", [7, 8, 2]),
        (":", list(range(10))),
        (":2,9:10", [0, 1, 9]),
    ],
)
def test_ranges(text: str, blocks: list[int]) -> None:
    assert BlockRanges.parse(text).blocks(10).tolist() == blocks


def test_a_file_of_ranges(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("4:6\n\n1\r\n 8: \n")
    assert BlockRanges.parse(f"@{tmp_path / 'list'}").blocks(10).tolist() == [4, 5, 1, 8, 9]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "the list of blocks is empty"),
        (" , ", "the list of blocks is empty"),
        ("1-3", "block range '1-3' is not understood"),
        ("-1:", "block range '-1:' is not understood"),
        ("1:2:3", "is not understood"),
        ("1;2", "is not understood"),
        ("٣", "is not understood"),
        ("5:5", "blocks 5:5 are empty or outside the cache, which has blocks 0:10"),
        ("6:5", "blocks 6:5 are empty or outside"),
        ("10", "blocks 10:11 are empty or outside"),
        ("10:", "blocks 10:10 are empty or outside"),
        ("0:99999999999999999", "are empty or outside"),
        ("0:4,7,3:5", "block 3 is listed more than once"),
    ],
)
def test_wrong_ranges(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        BlockRanges.parse(text).blocks(10)


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("nothing", "binary", "."):
        with pytest.raises(UsageError, match=r"the block list .* cannot be read"):
            BlockRanges.parse(f"@{tmp_path / name}")


@given(st.permutations(range(12)).flatmap(lambda order: st.integers(1, 12).map(lambda count: order[:count])))
def test_spelling_reads_back(blocks: list[int]) -> None:
    assert BlockRanges.parse(spell(np.array(blocks))).blocks(12).tolist() == blocks
