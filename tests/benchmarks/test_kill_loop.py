"""Ten rounds of the loop whose two hundred are `python -m benchmarks.kill_loop`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.kill_loop import kill_loop
from tests.faults import forkserver


def test_kills_at_random(tmp_path: Path) -> None:
    """It raises where a cache is not what it must be."""
    tally = kill_loop(tmp_path, 10, 1, forkserver())
    assert tally.rounds == 10
    assert tally.kills > 0
    assert tally.commits > 0
