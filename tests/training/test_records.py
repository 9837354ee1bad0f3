"""metrics.jsonl, whole checkpoints and the picture."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from logitcache.errors import TrainingError
from logitcache.training.records import (
    COMPLETE,
    MetricsLog,
    RecordCallback,
    last_whole_checkpoint,
    plot_losses,
    remove_half_checkpoints,
)
from logitcache.training.run_folder import RunFolder


def test_metrics_come_back_in_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.rows() == []
    written = [{"step": step, "loss": step / 3} for step in range(1, 5)]
    for row in written:
        log.append(row)
    assert log.rows() == written
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == written


def test_cut_forgets_later_steps_and_a_half_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 2, 3):
        log.append({"step": step, "loss": 0.5})
    whole = log.path.read_text()
    log.path.write_text(whole + '{"step": 4, "lo')
    assert [row["step"] for row in log.rows()] == [1, 2, 2, 3]
    log.cut(2)
    assert log.path.read_text() == "".join(line + "\n" for line in whole.splitlines()[:3])
    log.append({"step": 3})
    assert [row["step"] for row in log.rows()] == [1, 2, 2, 3]
    log.cut(-1)
    assert log.path.read_bytes() == b""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_makes_the_file(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.cut(-1)
    assert log.path.exists()


def checkpoint(folder: Path, step: int, whole: bool) -> None:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    if whole:
        (path / COMPLETE).write_text(json.dumps({"samples_seen": step}))


def test_half_written_checkpoints_are_removed(tmp_path: Path) -> None:
    for step, whole in ((2, True), (10, True), (12, False), (3, False)):
        checkpoint(tmp_path, step, whole)
    said = [f"{tmp_path / 'checkpoint-12'} is passed over: it was not written to its end"]
    assert last_whole_checkpoint(tmp_path) == ((tmp_path / "checkpoint-10", {"samples_seen": 10}), said)
    assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) == ((tmp_path / "checkpoint-10", {"samples_seen": 10}), said)
    remove_half_checkpoints(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2", "checkpoint-best"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", b"weigh"),
        ("model.safetensors", b"weightz"),
        ("model.safetensors", None),
        (COMPLETE, b'{"samples_seen": 4'),
        (COMPLETE, b"[4]"),
        (COMPLETE, b""),
        (COMPLETE, b"\xff"),
        (COMPLETE, b'{"samples_seen": 4, "files": 3}'),
    ],
)
def test_damaged_checkpoints_are_removed(name: str, damage: bytes | None, tmp_path: Path) -> None:
    """The one before is gone on from."""
    for step in (2, 4):
        checkpoint(tmp_path, step, whole=False)
        state, control = SimpleNamespace(global_step=step, max_steps=9), SimpleNamespace(should_training_stop=False)
        callback = RecordCallback(MetricsLog(tmp_path / "m"), lambda step: {"samples_seen": step}, lambda *_: None)
        callback.on_save(SimpleNamespace(output_dir=tmp_path), state, control)
    assert last_whole_checkpoint(tmp_path) == ((tmp_path / "checkpoint-4", {"samples_seen": 4}), [])
    if damage is None:
        (tmp_path / "checkpoint-4" / name).unlink()
    else:
        (tmp_path / "checkpoint-4" / name).write_bytes(damage)
    said = [f"{tmp_path / 'checkpoint-4'} is passed over: {name} is {'missing' if damage is None else 'damaged'}"]
    assert last_whole_checkpoint(tmp_path) == ((tmp_path / "checkpoint-2", {"samples_seen": 2}), said)
    remove_half_checkpoints(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_no_whole_checkpoint(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "nothing") == (None, [])
    checkpoint(tmp_path, 1, whole=False)
    assert last_whole_checkpoint(tmp_path)[0] is None
    remove_half_checkpoints(tmp_path, -1)
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    """They are not said to be impossible to write."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    wrong = pytest.raises(TrainingError, match=r"cannot be read .*remove the damaged checkpoint")
    with wrong, RunFolder(tmp_path / "out").writing():
        load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "rows", [[], [{"step": 1, "ce": 2.0, "divergence": 1.0}, {"step": 2, "ce": 1.5, "eval_kl": 1}]]
)
def test_the_picture(rows: list[dict[str, float]], tmp_path: Path) -> None:
    plot_losses(rows, tmp_path / "loss.png", "title")
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 5000
