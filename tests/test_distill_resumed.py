"""run_training on the folder of an earlier run: what goes on, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from logitcache.errors import TrainingError, UsageError
from tests.caches import Dumped
from tests.short_runs import eight_steps, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def values(dumped: Dumped, unsteady_student: Path, tmp_path: Path) -> dict[str, Any]:
    return eight_steps(dumped, unsteady_student, tmp_path / "out")


def test_resuming_a_finished_run_returns_its_result(values: dict[str, Any]) -> None:
    result = train(values, max_steps=2)
    before = sorted((path, path.stat().st_mtime_ns) for path in Path(values["out"]).rglob("*"))
    assert train(values, resume=True, max_steps=2) == result
    assert sorted((path, path.stat().st_mtime_ns) for path in Path(values["out"]).rglob("*")) == before


def test_training_is_quiet_when_it_resumes(values: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    class Stopped(Exception):
        pass

    def stop(step: int, total: int, metrics: dict[str, float]) -> None:
        if step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        train(values, progress=stop)
    train(values, resume=True)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_options_of_later_versions_have_their_defaults(values: dict[str, Any]) -> None:
    """A run that was begun before an option existed can be resumed."""
    train(values, max_steps=2)
    path = Path(values["out"]) / "run.json"
    record = json.loads(path.read_text())
    del record["options"]["fsdp"], record["options"]["z_loss"]
    path.write_text(json.dumps(record))
    assert train(values, resume=True, max_steps=2)["steps"] == 2
    with pytest.raises(TrainingError, match=r"z_loss: the run has 0\.0, now 0\.5"):
        train(values, resume=True, max_steps=2, z_loss=0.5)


def test_resume_with_other_options(values: dict[str, Any], dumped: Dumped) -> None:
    train(values, max_steps=2)
    with pytest.raises(TrainingError) as caught:
        train(values, resume=True, max_steps=2, learning_rate=0.5, seed=3)
    message = str(caught.value)
    assert "learning_rate: the run has 0.01, now 0.5" in message
    assert "seed: the run has 0, now 3" in message
    assert "alpha" not in message
    with pytest.raises(TrainingError, match="cache's content is another one"):
        train(values, resume=True, max_steps=2, cache=str(dumped.dense))


def test_resume_with_another_objective(values: dict[str, Any], dumped: Dumped) -> None:
    values |= {"cache": str(dumped.varopt), "tail": "blend", "blend": 0.0, "max_steps": 2}
    train(values)
    with pytest.raises(TrainingError) as caught:
        train(values, resume=True, blend_end=1.0, z_loss=1e-4)
    assert "blend_end: the run has None, now 1.0" in str(caught.value)
    assert "z_loss: the run has 0.0, now 0.0001" in str(caught.value)
    with pytest.raises(TrainingError, match="objective: the run has 'auto', now 'jsd'"):
        train({key: value for key, value in values.items() if key not in ("tail", "blend")}, True, objective="jsd")


def test_resume_with_the_cache_elsewhere(values: dict[str, Any], dumped: Dumped, tmp_path: Path) -> None:
    result = train(values, max_steps=2)
    shutil.copytree(dumped.top_k, tmp_path / "moved")
    assert train(values, resume=True, max_steps=2, cache=str(tmp_path / "moved")) == result


def test_the_folder_of_a_run(values: dict[str, Any]) -> None:
    """Occupied, absent, not a folder, or with a damaged result.json or run.json."""
    out = Path(values["out"])
    with pytest.raises(TrainingError, match="no run to resume; start it without --resume"):
        train(values, resume=True)
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(UsageError, match="is a file"):
        train(values)
    out.unlink()
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(TrainingError, match="not empty and holds no run"):
        train(values)
    (out / "thesis.tex").unlink()
    (out / "run.json.tmp").write_text("{")
    train(values, max_steps=2)
    with pytest.raises(TrainingError, match="holds a run already; go on with --resume"):
        train(values, max_steps=2)
    (out / "result.json").write_text("{")
    with pytest.raises(TrainingError, match=r"result\.json is damaged .*; remove it and use --resume"):
        train(values, resume=True, max_steps=2)
    (out / "run.json").write_text("{")
    with pytest.raises(TrainingError, match=r"run\.json is damaged"):
        train(values, resume=True, max_steps=2)
