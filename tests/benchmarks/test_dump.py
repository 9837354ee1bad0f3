"""The parts of `python -m benchmarks.dump`, on a tiny teacher."""

from __future__ import annotations

import pytest

from benchmarks import dump, measure
from benchmarks.dump_jobs import Problem
from tests.caches import corpus_text
from tests.faults import forkserver
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "teacher")
    (folder / "corpus.txt").write_text(corpus_text(20))
    return Problem(str(folder / "teacher"), (str(folder / "corpus.txt"),), 512, 64, 16)


def ratio(cell: str) -> float:
    return float(cell.rstrip("%"))


@pytest.mark.usefixtures("one_thread")
def test_speed(problem: Problem) -> None:
    bare, *dumps = dump.speed(problem, 2)
    assert bare[3] == "1.00"
    for row, name in zip(dumps, dump.SELECTIONS, strict=True):
        assert row[1] == f"dump --select {name}"
        assert ratio(row[3]) > 0
        assert ratio(row[4].split()[0]) <= ratio(row[3]) <= ratio(row[4].split()[2])
        assert 0 < ratio(row[5]) < 100
        assert 0 <= ratio(row[6]) <= 100


@pytest.mark.usefixtures("one_thread")
def test_capture_alone(problem: Problem) -> None:
    bare, *captures = dump.capture_alone(problem, 2)
    assert bare[3] == "1.00"
    assert [row[1] for row in captures] == [f"capture of {name}" for name in dump.SELECTIONS]
    assert all(ratio(row[3]) > 0 for row in captures)


def test_a_job_is_compared_with_the_base_around_it() -> None:
    """A machine that gets slower by the minute: the job takes twice as long as the base at every moment."""
    moments = iter(range(1, 100))
    base, found = measure.beside(lambda: float(next(moments)), {"job": lambda: 2.0 * next(moments)}, 3)
    assert base == [1, 3, 5, 7]
    assert found["job"].seconds == [4, 8, 12]
    assert found["job"].shares == [0.5, 0.5, 0.5]
    assert found["job"].quartiles == "0.500 to 0.500"


@pytest.mark.usefixtures("one_thread")
def test_workers(problem: Problem) -> None:
    rows = dump.workers(problem, 1, forkserver())
    names = ["bare loop", "2 bare loops, 1 thread each", "1 worker, 1 threads", "2 workers, 1 threads each"]
    assert [row[1] for row in rows] == names
    assert rows[0][3] == rows[1][4] == "1.000"
    assert all(ratio(cell) > 0 for row in rows for cell in row[3:])


@pytest.mark.usefixtures("one_thread")
def test_batches(problem: Problem) -> None:
    rows = dump.batches(problem, 1, (16, 64, 256))
    assert [row[1] for row in rows] == ["16", "64", "256"]
    assert rows[1][3] == "1.000"
    assert all(ratio(row[3]) > 0 for row in rows)
