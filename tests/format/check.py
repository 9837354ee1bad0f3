"""Compares what the independent reader reads with what `open_cache` reads, or with what was written down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.store import open_cache
from tests.format.reader import Contents, read_cache
from tests.golden.make import content

FLOATS = ("weights", "tail_mass", "threshold", "label_logprob", "entropy")


def check_contents(found: Contents, expected: Mapping[str, Any]) -> None:
    """Whole numbers, columns in steps and special values are equal; weights within 1 ulp of float32.

    FORMAT.md leaves the last bit of a weight open, as sums may be taken in any order.
    """
    for name in ("blocks", "tokens", "ids"):
        assert getattr(found, name) == expected[name], name
    assert found.counted == expected.get("counted", [])
    for name in FLOATS:
        mine, theirs = _float32(getattr(found, name)), _float32(expected[name])
        assert mine.shape == theirs.shape, name
        if name in ("label_logprob", "entropy"):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
            continue
        finite = np.isfinite(theirs)
        np.testing.assert_array_equal(mine[~finite], theirs[~finite], err_msg=name)
        np.testing.assert_array_max_ulp(mine[finite], theirs[finite], maxulp=1)
    lengths = [len(row) for row in found.ids]
    assert lengths == [len(row) for row in found.weights] == [len(row) for row in expected["weights"]]


def check_cache(root: Path) -> Contents:
    """Both readers read the same; what they read."""
    found = read_cache(root)
    check_contents(found, content(open_cache(root, partial=True)))
    return found


def _float32(values: list[Any]) -> np.ndarray:
    flat = [one for row in values for one in row] if values and isinstance(values[0], list) else values
    return np.array([float(one) for one in flat], dtype=np.float64).astype(np.float32)
