"""The worked examples of FORMAT.md section 6.6, number for number, written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import logitcache.store
from logitcache.codec import Codebook, HeadTailValues, LayoutName, Planes, ProbabilityValues, RowCodec
from logitcache.targets import SparseTargets

TOKENS = np.array([7, 2, 7])
UNKNOWN = {"label_logprob": np.zeros(3, dtype=np.int64), "entropy": np.zeros(3, dtype=np.int64)}
TABLES = {"ids": np.array([7, 2]), "context_sizes": np.array([2]), "candidates": np.array([1, 6])}
SAMPLES = SparseTargets([0, 3, 4, 6], [2, 5, 9, 7, 2, 3], [0.5, 0.25, 0.25, 1, 0.25, 0.75], unbiased=True)
LITERAL: dict[LayoutName, dict[str, list[int]]] = {
    "small": {"ids": [0, 0, 1, 1, 5, 9], "counts": [1, 3, 0, 0, 2, 0]},
    "fast": {"lengths": [3, 1, 2], "ids": [4, 2, 3, 3, 9, 0], "counts": [1, 0, 0, 3, 0, 2]},
}


def codebook() -> Codebook:
    return Codebook.from_planes(TABLES, 10)


@pytest.mark.parametrize("layout", ["small", "fast"])
def test_layouts(layout: LayoutName) -> None:
    codec = RowCodec.for_selection("sample", 4, None, layout)
    assert codec.to_dict() == {"layout": layout, "values": "counts", "draws": 4}
    planes = codec.encode(TOKENS, SAMPLES, codebook(), lambda count: np.zeros(count))
    literal = LITERAL[layout]
    assert {name: plane.tolist() for name, plane in planes.items() if name not in UNKNOWN} == literal
    read = codec.decode(TOKENS, {**_arrays(literal), **UNKNOWN}, codebook())
    for name in ("offsets", "ids", "weights", "threshold"):
        np.testing.assert_array_equal(getattr(read, name), getattr(SAMPLES, name))


def test_tables() -> None:
    tables = codebook()
    assert tables.ranks.decode(np.arange(10)).tolist() == [7, 2, 0, 1, 3, 4, 5, 6, 8, 9]
    assert tables.ranks.encode(TOKENS).tolist() == [0, 1, 0]
    assert {name: plane.tolist() for name, plane in tables.to_planes().items()} == {
        name: plane.tolist() for name, plane in TABLES.items()
    }


def test_head_and_tail() -> None:
    row = {"lengths": [4], "ids": [0, 0, 0, 0], "levels": [1, 1042, 0, 0], "rest": [1041], "precision": [0]}
    read = _one_row(RowCodec("fast", HeadTailValues()), row)
    assert read.weights.tolist() == [0.5, 0.25, 0.125, 0.125]
    assert read.threshold.tolist() == [0.125]


def test_probabilities() -> None:
    row = {"lengths": [2], "ids": [0, 0], "levels": [64, 0], "least": [1072], "tail": [2050]}
    read = _one_row(RowCodec("fast", ProbabilityValues()), row)
    np.testing.assert_array_max_ulp(read.weights, np.array([0.4, 0.1], dtype=np.float32), maxulp=1)
    assert read.tail_mass.tolist() == [0.5]


def test_the_examples_stand_in_the_specification() -> None:
    text = (Path(logitcache.store.__file__).parent / "FORMAT.md").read_text()
    for layout, planes in LITERAL.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{layout}` | 0 1 0 |"))
        cells = [[int(number) for number in cell.replace(",", " ").split()] for cell in line.split("|")[3:-1]]
        assert cells == [planes.get(name, []) for name in ("lengths", "ids", "counts")]


def _one_row(codec: RowCodec, row: dict[str, list[int]]) -> SparseTargets:
    side = {name: plane[:1] for name, plane in UNKNOWN.items()}
    return codec.decode(np.array([7]), {**_arrays(row), **side}, codebook())


def _arrays(planes: dict[str, list[int]]) -> Planes:
    stored: dict[str, Any] = {name: np.array(numbers, dtype=np.uint16) for name, numbers in planes.items()}
    return stored
