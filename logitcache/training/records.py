"""What a run leaves behind besides weights: metrics.jsonl, whole checkpoints only, and a picture of its losses."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
from transformers import TrainerCallback

from logitcache.errors import TrainingError
from logitcache.training.ranks import ALONE, Ranks

COMPLETE = "logitcache_reader.json"
# Among the reader's state: name and CRC32C of the checkpoint's files.
FILES = "files"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_PART_BYTES = 4 << 20
# A folder and the reader's state.
Checkpoint = tuple[Path, dict[str, Any]]


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there with all of its text, or as it was before: a kill leaves no half of it."""
    unfinished(path).write_text(text)
    unfinished(path).replace(path)


def unfinished(path: Path) -> Path:
    """Where `write_whole` puts a file before it is whole."""
    return path.with_name(f"{path.name}.tmp")


class MetricsLog:
    """metrics.jsonl: one line for each logged step. Resuming drops lines from after the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, last_step: int) -> None:
        """Forget everything after `last_step`."""
        kept = [row for row in self.rows() if row["step"] <= last_step]
        # A kill at this moment must not cost the rows that no resumed run makes again.
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All lines; one that a kill left half-written is left out."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows


class RecordCallback(TrainerCallback):
    """Writes metrics, marks whole checkpoints with the reader's state, and tells `progress` about each step.

    Of several ranks the main one writes and tells; all stop when training has diverged.

    Args:
        metrics: where logged values go.
        reader_state: global step -> state of the reader after it.
        progress: called as progress(step, total_steps, latest metrics).
        ranks: that train together.
    """

    def __init__(
        self,
        metrics: MetricsLog,
        reader_state: Callable[[int], dict[str, Any]],
        progress: Callable[[int, int, dict[str, float]], None],
        ranks: Ranks = ALONE,
    ) -> None:
        self._metrics, self._reader_state, self._progress, self._ranks = metrics, reader_state, progress, ranks
        self._latest: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        values = {name: value for name, value in (logs or {}).items() if name not in ("total_flos", "epoch")}
        if "train_runtime" in values:
            return
        self._check_finite(state.global_step, values)
        if self._ranks.is_main:
            self._metrics.append({"step": state.global_step, **values})
            self._latest |= values
            self._progress(state.global_step, state.max_steps, self._latest)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._ranks.is_main:
            self._progress(state.global_step, state.max_steps, self._latest)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Trainer writes a checkpoint file by file, some on each rank; this one comes last, so a folder that has it is
        # whole.
        self._ranks.wait()
        if not self._ranks.is_main:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        stopped = {"stopped": True} if control.should_training_stop and state.global_step < state.max_steps else {}
        state_here = {**self._reader_state(state.global_step), **stopped, FILES: _checksums(folder)}
        write_whole(folder / COMPLETE, json.dumps(state_here))

    def _check_finite(self, step: int, values: dict[str, float]) -> None:
        """Stop a run whose weights are lost, before they become a checkpoint or the trained student."""
        for name in ("loss", "eval_ce"):
            if not math.isfinite(values.get(name, 0.0)):
                raise self._ranks.common(diverged(f"{name} is {values[name]} at step {step}"))


def diverged(what: str) -> TrainingError:
    """The error of a run whose weights are lost, `what` being the sign of it."""
    return TrainingError(
        f"{what}: training diverged; begin again in another --out with a lower --learning-rate or more warmup"
    )


def last_whole_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, with its reader state, and a sentence about each newer one.

    Older ones are not read.
    """
    passed_over: list[str] = []
    for _, path in sorted(_checkpoints(folder).items(), reverse=True):
        state, wrong = _state_of(path)
        if state is not None:
            return (path, state), passed_over
        passed_over.append(f"{path} is passed over: {wrong}")
    return None, passed_over


def _checkpoints(folder: Path) -> dict[int, Path]:
    """By their steps; a folder of another name, such as checkpoint-best, is the user's."""
    found = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(name[1]): path for name, path in found if name}


def _state_of(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The reader's state of a checkpoint; None, and why, unless it is what was written, completely.

    Trainer itself goes on without a word where the optimizer's file is gone. A power failure may cut files short.
    """
    if not (folder / COMPLETE).exists():
        return None, "it was not written to its end"
    try:
        state = json.loads((folder / COMPLETE).read_text())
        written, there = state.pop(FILES, {}), _checksums(folder)
        differing = next((name for name, checksum in written.items() if there.get(name) != checksum), None)
    except OSError as error:
        return None, f"it cannot be read ({error.strerror})"
    except (ValueError, TypeError, AttributeError):
        return None, f"{COMPLETE} is damaged"
    if differing is None:
        return state, ""
    return None, f"{differing} is {'damaged' if differing in there else 'missing'}"


def _checksums(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(COMPLETE)]
    return {path.name: _crc32c(path) for path in files}


def _crc32c(path: Path) -> str:
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while part := file.read(_PART_BYTES):
            checksum.update(part)
    return checksum.hexdigest().decode()


def remove_half_checkpoints(folder: Path, last_step: int) -> None:
    """Remove what a kill left half-written, and what is newer than the checkpoint that is gone on from: damaged."""
    for step, path in _checkpoints(folder).items():
        if step > last_step or not (path / COMPLETE).exists():
            shutil.rmtree(path)


def plot_losses(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """A PNG of training loss, cross entropy and divergence, and of the held-out values, against optimiser steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (
        ("ce", "training cross entropy", "-"),
        ("divergence", "training divergence", "-"),
        ("eval_ce", "held-out cross entropy", "o--"),
        ("eval_kl", "held-out KL from the teacher", "o--"),
        ("eval_other_ce", "other domain, cross entropy", "s:"),
    ):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.4)
    axes.set(xlabel="optimiser step", ylabel="nats per token", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
