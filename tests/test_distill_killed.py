"""run_training in a process that dies: resumed, it ends as the run that was not interrupted, bit for bit."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache import models
from logitcache.training.records import COMPLETE
from tests.caches import BLOCK_LENGTH, Dumped
from tests.faults import forkserver, start
from tests.short_runs import assert_same_run, eight_steps, train

pytestmark = pytest.mark.usefixtures("one_thread")

Child = Callable[..., int]


@pytest.fixture
def values(dumped: Dumped, unsteady_student: Path, tmp_path: Path) -> dict[str, Any]:
    return eight_steps(dumped, unsteady_student, tmp_path / "out")


@pytest.fixture(scope="module")
def in_child() -> Iterator[Child]:
    """Call as in_child(values, resume, kill, at): train in a process of its own, which kills itself at step `at` in
    the way `kill` names; returns the exit status. The processes are forked from one that only imports.
    """
    context = forkserver()
    here, there = context.Pipe()
    nursery = start(context, _nursery, there)
    there.close()

    def run(values: dict[str, Any], resume: bool = False, kill: str = "", at: int = 0) -> int:
        here.send((values, resume, kill, at))
        return int(here.recv())

    yield run
    here.send(None)
    nursery.join()


@pytest.fixture(scope="module")
def uninterrupted(
    in_child: Child, dumped: Dumped, unsteady_student: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run that interrupted ones must equal; made in a child, as those are."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert in_child(eight_steps(dumped, unsteady_student, out)) == 0
    return out


def _nursery(jobs: Any) -> None:
    while (job := jobs.recv()) is not None:
        child = os.fork()
        if child == 0:
            try:
                _child(*job)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        jobs.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _child(values: dict[str, Any], resume: bool, kill: str, at: int) -> None:
    torch.set_num_threads(1)
    if kill == "checkpoint":
        _die_while_saving(at)
    if kill == "result":
        _die_before("save_model")

    def progress(step: int, total: int, metrics: dict[str, float]) -> None:
        if kill == "step" and step == at:
            _die()

    train(values, resume, progress)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_while_saving(step: int) -> None:
    """Die in the middle of a checkpoint: after the weights, before the optimiser's state."""
    from logitcache.training import DistillationTrainer

    def save(self: Any, folder: str) -> None:
        if self.state.global_step == step:
            _die()
        whole(self, folder)

    whole = DistillationTrainer._save_optimizer_and_scheduler
    DistillationTrainer._save_optimizer_and_scheduler = save


def _die_before(name: str) -> None:
    """Die when all steps are done, before the student is written."""
    setattr(models, name, lambda *_: _die())


@pytest.mark.parametrize(
    ("kill", "at"), [("step", 1), ("step", 4), ("step", 5), ("checkpoint", 2), ("checkpoint", 6), ("result", 0)]
)
def test_killed_and_resumed(values: dict[str, Any], in_child: Child, uninterrupted: Path, kill: str, at: int) -> None:
    """Before the first checkpoint, at a checkpoint, after it, inside one, and after the last step."""
    assert in_child(values, kill=kill, at=at) == -signal.SIGKILL
    out = Path(values["out"])
    assert not (out / "result.json").exists()
    assert in_child(values, resume=True) == 0
    assert_same_run(uninterrupted, out)
    assert all((folder / COMPLETE).exists() for folder in (out / "checkpoints").iterdir())


def test_killed_and_resumed_twice(values: dict[str, Any], in_child: Child, uninterrupted: Path) -> None:
    assert in_child(values, kill="step", at=3) == -signal.SIGKILL
    assert in_child(values, resume=True, kill="step", at=7) == -signal.SIGKILL
    with (Path(values["out"]) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert in_child(values, resume=True) == 0
    assert_same_run(uninterrupted, Path(values["out"]))


def test_accumulation_and_many_epochs_resume_too(values: dict[str, Any], in_child: Child, tmp_path: Path) -> None:
    """The whole cache is 108 blocks; with 2 * 30 in a step, every second step begins another epoch."""
    values |= {"batch_tokens": 30 * BLOCK_LENGTH, "accumulate": 2, "max_steps": 4, "alpha_schedule": "wsd"}
    whole = values | {"out": str(tmp_path / "whole")}
    assert in_child(whole) == 0
    assert in_child(values, kill="step", at=3) == -signal.SIGKILL
    assert in_child(values, resume=True) == 0
    assert_same_run(tmp_path / "whole", Path(values["out"]))


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors"])
def test_a_checkpoint_with_flipped_bits_is_passed_over(
    name: str, values: dict[str, Any], in_child: Child, uninterrupted: Path
) -> None:
    """The one before leads to the same weights."""
    assert in_child(values, kill="step", at=7) == -signal.SIGKILL
    damaged = Path(values["out"]) / "checkpoints" / "checkpoint-6" / name
    damaged.write_bytes(damaged.read_bytes()[:-64] + bytes(64))
    assert in_child(values, resume=True) == 0
    assert_same_run(uninterrupted, Path(values["out"]))
