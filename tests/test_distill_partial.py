"""`train --partial` (fault 27): a run on what an unfinished dump had written, pinned to its end and through resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitcache.distill import run_training
from logitcache.errors import CacheError, TrainingError
from logitcache.store import open_cache
from logitcache.training.options import TrainOptions
from tests.caches import BLOCK_LENGTH, Dumped, student_yaml
from tests.runs import assert_same_weights

pytestmark = pytest.mark.usefixtures("one_thread")

# Of seven: 48 of 108 blocks.
UNITS = 3


class Stopped(Exception):
    pass


@pytest.fixture
def growing(dumped: Dumped, tmp_path: Path) -> Path:
    """A cache as its dump left it after the first units."""
    root = tmp_path / "growing"
    shutil.copytree(dumped.top_k, root)
    (root / "manifest.json").unlink()
    for unit in range(UNITS, 7):
        (root / "commits" / f"{unit:06}.json").unlink()
    return root


@pytest.fixture
def values(growing: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "cache": str(growing),
        "partial": True,
        "student": str(student_yaml(tmp_path / "student.yaml")),
        "out": str(tmp_path / "out"),
        "epochs": 2,
        "batch_tokens": 8 * BLOCK_LENGTH,
        "log_every": 2,
        "save_every": 2,
        "device": "cpu",
    }


def train(values: dict[str, Any], resume: bool = False, progress: Any = None, **changes: Any) -> dict[str, Any]:
    return run_training(TrainOptions.build(values | changes), resume, progress)


def at_step(wanted: int, then: Callable[[], None]) -> Callable[..., None]:
    def progress(step: int, total: int, metrics: dict[str, float]) -> None:
        if step == wanted:
            then()

    return progress


def stop() -> None:
    raise Stopped


def commit_another(growing: Path, dumped: Dumped) -> None:
    shutil.copy(dumped.top_k / "commits" / f"{UNITS:06}.json", growing / "commits")


def finish(growing: Path, dumped: Dumped) -> None:
    shutil.copytree(dumped.top_k, growing, dirs_exist_ok=True)


def test_pinned_while_the_dump_goes_on(values: dict[str, Any], growing: Path, dumped: Dumped, tmp_path: Path) -> None:
    """Units are committed during the run; it is stopped and resumed twice, at last with the dump finished."""
    result = train(values, out=str(tmp_path / "whole"))
    assert (result["steps"], result["eval_tokens"]) == (12, 2 * (BLOCK_LENGTH - 1))

    with pytest.raises(Stopped):
        train(values, progress=at_step(3, stop))
    commit_another(growing, dumped)
    with pytest.raises(Stopped):
        train(values, resume=True, progress=at_step(7, stop))
    finish(growing, dumped)
    assert train(values, resume=True)["eval_ce"] == result["eval_ce"]

    assert_same_weights(tmp_path / "out", tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["units"] == [UNITS]


def test_a_new_run_takes_what_is_there_now(values: dict[str, Any], growing: Path, dumped: Dumped) -> None:
    commit_another(growing, dumped)
    train(values, max_steps=2)
    record = json.loads((Path(values["out"]) / "run.json").read_text())
    assert record["units"] == [UNITS + 1]
    assert record["fingerprints"] == [open_cache(dumped.top_k).snapshot(UNITS + 1).fingerprint]


def test_a_finished_cache_is_all_there(values: dict[str, Any], dumped: Dumped, tmp_path: Path) -> None:
    whole = train(values, cache=str(dumped.top_k), max_steps=2, partial=False)
    part = train(values, cache=str(dumped.top_k), max_steps=2, out=str(tmp_path / "other"))
    assert part["eval_ce"] == whole["eval_ce"]


def test_refused_without_the_option(values: dict[str, Any]) -> None:
    with pytest.raises(CacheError, match=r"is unfinished; .*\(`train --partial` and, in Python, open_cache"):
        train(values, partial=False)
    assert not Path(values["out"]).exists()


def test_resume_on_a_dump_that_lacks_its_units(values: dict[str, Any], growing: Path) -> None:
    """As where the dump began anew. A cache with the same number of other units is another cache."""
    train(values, max_steps=2)
    (growing / "commits" / "000002.json").unlink()
    (Path(values["out"]) / "result.json").unlink()
    with pytest.raises(CacheError, match="has not its first 3 units but 2 yet"):
        train(values, resume=True, max_steps=2)


def test_resume_on_another_dump(values: dict[str, Any], dumped: Dumped) -> None:
    train(values, max_steps=2)
    with pytest.raises(TrainingError, match="the cache's content is another one"):
        train(values, resume=True, max_steps=2, cache=str(dumped.dense))


def test_nothing_written_yet(values: dict[str, Any], growing: Path) -> None:
    for commit in (growing / "commits").iterdir():
        commit.unlink()
    with pytest.raises(CacheError, match="has none of its units yet; wait until its dump has written more"):
        train(values)
    assert not Path(values["out"]).exists()
