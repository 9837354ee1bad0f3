"""early_stop: where a run ends, which student it writes, and that a kill changes neither."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from logitcache.distill import run_training
from logitcache.errors import UsageError
from logitcache.training.options import TrainOptions
from tests.caches import BLOCK_LENGTH, Dumped, student_yaml
from tests.runs import assert_same_weights, result_of, rows_of
from tests.train_ranks import Job, Nursery

PATIENCE = 2


@pytest.fixture(scope="module")
def options(dumped: Dumped, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With such a learning rate the student gets better and worse again."""
    return {
        "cache": str(dumped.top_k),
        "student": str(student_yaml(tmp_path_factory.mktemp("student") / "student.yaml")),
        "max_steps": 30,
        "batch_tokens": 4 * BLOCK_LENGTH,
        "log_every": 2,
        "eval_every": 2,
        "learning_rate": 0.1,
        "lr_schedule": "constant",
        "early_stop": PATIENCE,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def stopped(nursery: Nursery, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    assert nursery(Job(options | {"out": str(folder / "out")}, world=0, folder=folder)) == [0]
    return folder / "out"


def test_it_stops_and_keeps_the_best(stopped: Path) -> None:
    losses = {row["step"]: row["eval_ce"] for row in rows_of(stopped) if "eval_ce" in row}
    result = result_of(stopped)
    best, last = result["best_step"], max(losses)
    assert losses[best] == min(losses.values()) == result["eval_ce"]
    assert last == best + 2 * PATIENCE < 30
    # Not before: no earlier stretch of so many evaluations was without a new lowest one.
    lows = [step for step in losses if losses[step] == min(losses[other] for other in losses if other <= step)]
    assert max(after - before for before, after in pairwise(lows)) <= 2 * PATIENCE
    assert (result["steps"], result["stopped_at"], result["tokens"]) == (last, last, last * 4 * BLOCK_LENGTH)
    assert [row["stopped_at"] for row in rows_of(stopped) if "stopped_at" in row] == [last]
    assert_same_weights(stopped, stopped / "checkpoints" / f"checkpoint-{best}")


@pytest.mark.parametrize("place", ["after one worse evaluation", "before the student is written"])
def test_killed_and_resumed(
    place: str, nursery: Nursery, options: dict[str, Any], stopped: Path, tmp_path: Path
) -> None:
    values = options | {"out": str(tmp_path / "out")}
    at = result_of(stopped)["best_step"] + 3 if place.startswith("after") else 0
    assert nursery(Job(values, 0, kill={0: at}, folder=tmp_path)) == [-signal.SIGKILL]
    assert not (tmp_path / "out" / "result.json").exists()
    assert nursery(Job(values, 0, resume=True, folder=tmp_path)) == [0]
    assert rows_of(tmp_path / "out") == rows_of(stopped)
    assert result_of(tmp_path / "out") == result_of(stopped)
    assert_same_weights(tmp_path / "out", stopped)
    assert nursery(Job(values, 0, resume=True, folder=tmp_path)) == [0]
    assert result_of(tmp_path / "out") == result_of(stopped)
    assert (tmp_path / "err0").read_text() == ""


def test_sharded_over_processes(nursery: Nursery, options: dict[str, Any], stopped: Path, tmp_path: Path) -> None:
    """All ranks stop at once, and the best student is loaded into shards."""
    values = options | {"out": str(tmp_path / "out"), "fsdp": "full-shard"}
    assert nursery(Job(values, shard=True, folder=tmp_path)) == [0, 0]
    result = result_of(tmp_path / "out")
    assert result == pytest.approx(result_of(stopped), rel=1e-3)
    assert_same_weights(tmp_path / "out", tmp_path / "out" / "checkpoints" / f"checkpoint-{result['best_step']}")


def test_a_run_that_goes_on_improving(options: dict[str, Any], tmp_path: Path) -> None:
    values = options | {"out": str(tmp_path / "out"), "learning_rate": 1e-3, "max_steps": 4}
    result = run_training(TrainOptions.build(values))
    assert (result["steps"], result["best_step"]) == (4, 4)
    assert "stopped_at" not in result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 0}, "early_stop watches the cross entropy of held-out blocks"),
        ({"save_every": 3}, "save_every: early_stop makes a checkpoint at each evaluation"),
        ({"early_stop": 0}, "--early-stop is 0; it must be"),
    ],
)
def test_refused(changes: dict[str, Any], message: str, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run_training(TrainOptions.build(options | {"out": str(tmp_path / "out")} | changes))
    assert not (tmp_path / "out").exists()
