"""`logitcache train` as a process that dies or is stopped: resumed until it is done, it ends with the same losses."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcache.training.records import COMPLETE
from tests.caches import BLOCK_LENGTH, Dumped, student_yaml
from tests.faults import forkserver, start
from tests.runs import assert_same_weights, rows_of

STEPS = 10
Train = Callable[..., tuple[int, float]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Call as train(line, seconds, stop=(signal, step)): the command in a process of its own.

    It dies without a word after `seconds` of processor time, wherever it is then; at `step` it sends itself `signal`.
    What it says is in a file beside --out. Returns its exit status and the processor time that it took.
    """
    context = forkserver()
    here, there = context.Pipe()
    nursery = start(context, _nursery, there)
    there.close()

    def run(line: list[str], seconds: float = 0.0, stop: tuple[int, int] | None = None) -> tuple[int, float]:
        here.send((line, seconds, stop))
        ended: tuple[int, float] = here.recv()
        return ended

    yield run
    here.send(None)
    nursery.join()


def _nursery(jobs: Any) -> None:
    while (job := jobs.recv()) is not None:
        child = os.fork()
        if child == 0:
            _command(*job)
        _, status, used = os.wait4(child, 0)
        jobs.send((os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime))


def _command(line: list[str], seconds: float, stop: tuple[int, int] | None) -> None:
    """Never comes back."""
    from logitcache.cli.main import main
    from logitcache.cli.progress import TrainView

    out = os.open(said_by(line), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    torch.set_num_threads(1)
    sys.argv = ["logitcache", *line]
    if stop is not None:
        whole = TrainView.step

        def step(self: Any, number: int, total: int, metrics: dict[str, float]) -> None:
            whole(self, number, total, metrics)
            if number == stop[1]:
                os.kill(os.getpid(), stop[0])

        TrainView.step = step  # type: ignore[method-assign]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Nobody handles this signal, so that the process ends as from SIGKILL, between any two instructions.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))


def said_by(line: list[str]) -> Path:
    return Path(line[line.index("--out") + 1]).with_suffix(".txt")


def train_line(dumped: Dumped, out: Path) -> list[str]:
    """Ten steps, and a checkpoint after each."""
    student = student_yaml(out.parent / "student.yaml", attention_dropout=0.2)
    line = ["train", "--cache", dumped.sample, "--student", student, "--out", out, "--max-steps", STEPS]
    line += ["--batch-tokens", 4 * BLOCK_LENGTH, "--device", "cpu", "--learning-rate", 0.01]
    for assignment in ("log_every=1", "save_every=1", "eval_every=5", "accumulate=2"):
        line += ["--set", assignment]
    return [str(part) for part in line]


@dataclass(frozen=True)
class Whole:
    """The run that was not interrupted, and the processor time it took."""

    out: Path
    seconds: float


@pytest.fixture(scope="module")
def whole(train: Train, dumped: Dumped, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    out = tmp_path_factory.mktemp("whole") / "out"
    status, seconds = train(train_line(dumped, out))
    assert status == 0
    return Whole(out, seconds)


def assert_same(out: Path, whole: Whole) -> None:
    assert [row["step"] for row in rows_of(whole.out) if "loss" in row] == list(range(1, STEPS + 1))
    assert rows_of(out) == rows_of(whole.out)
    assert_same_weights(out, whole.out)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random(seed: int, train: Train, dumped: Dumped, whole: Whole, tmp_path: Path) -> None:
    """Four times, mostly: while loading, inside steps, checkpoints and evaluations, and at the end."""
    rng = np.random.default_rng(seed)
    line = train_line(dumped, tmp_path / "out")
    ends = []
    for seconds in [*rng.uniform(0.05, 0.9, 4) * whole.seconds, 0.0]:
        begun = (tmp_path / "out" / "run.json").exists()
        ends.append(train([*line, "--resume"] if begun else line, seconds)[0])
    assert ends[-1] == 0, said_by(line).read_text()
    assert set(ends) <= {0, -signal.SIGPROF}
    assert -signal.SIGPROF in ends
    assert_same(tmp_path / "out", whole)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_and_resumed(
    sent: int, status: int, train: Train, dumped: Dumped, whole: Whole, tmp_path: Path
) -> None:
    """Twice in a row; the second time in the first step after."""
    line = train_line(dumped, tmp_path / "out")
    for step, resume in ((3, []), (4, ["--resume"])):
        assert train([*line, *resume], stop=(sent, step))[0] == status
        said = said_by(line).read_text()
        assert "Traceback" not in said
        assert "--resume" in said.splitlines()[-1]
        assert not (tmp_path / "out" / "result.json").exists()
    assert train([*line, "--resume"])[0] == 0
    assert_same(tmp_path / "out", whole)


def test_a_checkpoint_that_was_cut_short(train: Train, dumped: Dumped, whole: Whole, tmp_path: Path) -> None:
    """As by a power failure. Without the optimizer's state Trainer itself would go on, to other losses."""
    line = train_line(dumped, tmp_path / "out")
    assert train(line, stop=(signal.SIGTERM, 5))[0] == 143
    last = tmp_path / "out" / "checkpoints" / "checkpoint-4"
    assert json.loads((last / COMPLETE).read_text())["samples_seen"] == 4 * 8
    (last / "optimizer.pt").unlink()
    assert train([*line, "--resume"])[0] == 0
    assert f"train: {last} is passed over: optimizer.pt is missing\n" in said_by(line).read_text()
    assert_same(tmp_path / "out", whole)
