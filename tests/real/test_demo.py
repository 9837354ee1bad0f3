"""The demo's own code on the real teacher and text, with small sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from logitcache.demo import run
from logitcache.distill import StepProgress
from logitcache.dump import Progress

pytestmark = pytest.mark.real_teacher


class Recorder:
    """A view that remembers what it was told."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}
        self.computed: list[int] = []
        self.stages: list[str] = []

    def say(self, text: str) -> None:
        self.stages.append(text)

    @contextmanager
    def dumping(self, name: str) -> Iterator[Progress]:
        self.stages.append(name)
        yield self

    def stage(self, what: str) -> None:
        self.stages.append(what)

    def advance(self, done: int, total: int, computed: int, num_bytes: int) -> None:
        self.computed.append(computed)

    @contextmanager
    def training(self, name: str) -> Iterator[StepProgress]:
        yield lambda step, total, metrics: self.steps.setdefault(name, []).append(step)


def test_small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "TRAIN_TOKENS", 1024)
    monkeypatch.setattr(run, "HELD_OUT_TOKENS", 256)
    monkeypatch.setitem(run.TRAINING, "batch_tokens", 512)
    monkeypatch.setitem(run.TRAINING, "epochs", 1)
    monkeypatch.setitem(run.TRAINING, "eval_tokens", 256)
    first = Recorder()
    result = run.run_demo(tmp_path / "demo", first)
    assert [row["run"] for row in result.rows] == [job.title for job in run.RUNS]
    assert {tuple(sorted(set(steps))) for steps in first.steps.values()} == {(1, 2)}, "every run has the same steps"
    assert max(first.computed) == 1024
    assert all(4 < row["held_out_ce"] < 12 and 0 < row["kl"] < 12 for row in result.rows)
    assert result.picture.stat().st_size > 20_000

    again = Recorder()
    assert run.run_demo(tmp_path / "demo", again).rows == result.rows
    assert not again.steps
    assert again.stages.count("nothing left to compute") == 2
