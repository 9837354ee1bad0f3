"""`docs/faults.md` names tests that exist and are run, for every fault."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAULTS = 28
_NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows() -> list[list[str]]:
    """The cells of every line of the tables, their heads left out."""
    lines = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in cells if row[-1] != "tests"]


def test_every_fault_has_a_line() -> None:
    numbers = [int(row[0]) for row in rows() if row[0].isdigit()]
    assert numbers == list(range(1, FAULTS + 1))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].replace(" ", "-"))
def test_its_tests_are_there(row: list[str]) -> None:
    named = _NAMED.findall(row[-1])
    assert named
    assert len(named) == row[-1].count("::"), row[-1]
    for path, name in named:
        functions = {node.name: node for node in ast.parse((ROOT / path).read_text()).body if hasattr(node, "name")}
        assert name in functions, f"{path} has no {name}"
        marks = [ast.unparse(mark) for mark in getattr(functions[name], "decorator_list", [])]
        assert not [mark for mark in marks if "skip" in mark or "xfail" in mark], f"{path}::{name} may not run"
