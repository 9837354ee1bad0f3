"""The folder of a run: run.json, train.yaml, metrics.jsonl, checkpoints/, result.json and, at the end, the student."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from logitcache.errors import TrainingError
from logitcache.store.layout import refuse_file, refuse_inside_cache
from logitcache.training.options import TrainOptions
from logitcache.training.records import (
    Checkpoint,
    MetricsLog,
    last_whole_checkpoint,
    remove_half_checkpoints,
    unfinished,
    write_whole,
)

# Where a run is done, which changes nothing about it.
_MAY_CHANGE = ("cache", "out", "device")
_CONFIG_HEAD = "# The same run again: logitcache train --config THIS_FILE --out ANOTHER_FOLDER\n"


class RunFolder:
    """The folder of one run. Nothing is written before `begin`; of several ranks only the main one writes.

    Raises UsageError for a cache, a folder inside one, and a URL.
    """

    def __init__(self, out: str | Path) -> None:
        self.path = Path(out)
        refuse_inside_cache(self.path, or_one=True)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = MetricsLog(self.path / "metrics.jsonl")
        self._record, self._result = self.path / "run.json", self.path / "result.json"
        self._config = self.path / "train.yaml"

    def result(self) -> dict[str, Any] | None:
        """What the finished run measured; None before its end. Raises TrainingError when its record is damaged."""
        return _read(self._result, "remove it and use --resume") if self._result.exists() else None

    @property
    def units(self) -> list[int] | None:
        """Units of each cache that the run here reads; None where there is none, or its record is damaged."""
        try:
            return [int(count) for count in json.loads(self._record.read_text())["units"]]
        except (OSError, ValueError, TypeError, KeyError):
            # Who compares the record with this run says what is wrong with it.
            return None

    def find_checkpoint(self, record: dict[str, Any], resume: bool) -> tuple[Checkpoint | None, list[str]]:
        """The last whole checkpoint with its reader state, None at the start of a run; and why newer ones are not it.

        Raises:
            UsageError: the folder is a file.
            TrainingError: it is not free, or, to resume, does not hold the run of this record.
        """
        refuse_file(self.path)
        if self._record.exists():
            if not resume:
                raise TrainingError(f"{self.path} holds a run already; go on with --resume or choose another --out")
            _check_same_run(self.path, self._stored_record(), record)
            return last_whole_checkpoint(self.checkpoints)
        if self.path.is_dir() and {entry.name for entry in self.path.iterdir()} - {unfinished(self._record).name}:
            raise TrainingError(f"{self.path} is not empty and holds no run; choose another folder for --out")
        if resume:
            raise TrainingError(f"{self.path} holds no run to resume; start it without --resume")
        return None, []

    def begin(self, record: dict[str, Any], last_step: int) -> None:
        """Make the folder, or clear it of what a killed run left from after `last_step`, -1 at the start.

        Comes after every check, so that a refused start leaves nothing behind.
        """
        if not self._record.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self._record, json.dumps(record, indent=1) + "\n")
        if not self._config.exists():
            write_whole(self._config, _CONFIG_HEAD + yaml.safe_dump(record["options"], sort_keys=False))
        remove_half_checkpoints(self.checkpoints, last_step)
        self.metrics.cut(last_step)

    def finish(self, result: dict[str, Any]) -> None:
        """Write what the run measured: from here on it is finished."""
        write_whole(self._result, json.dumps(result, indent=1) + "\n")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A full disk or a folder that cannot be written, which torch and safetensors report in ways of their own."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            if isinstance(error, SafetensorError) and "deserializ" in str(error):
                raise TrainingError(
                    f"weights in {self.checkpoints} cannot be read ({error}); remove the damaged checkpoint and go on "
                    "with --resume"
                ) from error
            advice = "choose another folder for --out"
            if self._record.exists():
                free = shutil.disk_usage(self.path).free
                advice = f"make room there ({free:,} bytes are free) and go on with --resume"
            reason = str(error).splitlines()[0]
            raise TrainingError(f"{self.path} cannot be written ({reason}); {advice}") from error

    def _stored_record(self) -> dict[str, Any]:
        record = _read(self._record, "choose another --out")
        for name, kind in (("options", dict), ("fingerprints", list)):
            if not isinstance(record.get(name), kind):
                raise TrainingError(f"{self._record} is damaged (it names no {name}); choose another --out")
        return record


def _read(path: Path, advice: str) -> dict[str, Any]:
    """A JSON object. Raises TrainingError, with the advice, where the file holds something else."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise TrainingError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise TrainingError(f"{path} is damaged (it holds no JSON object); {advice}")
    return value


def _check_same_run(path: Path, stored: dict[str, Any], mine: dict[str, Any]) -> None:
    # What an older version knew nothing of was as it is by default.
    defaults = {name: field.get_default() for name, field in TrainOptions.model_fields.items()}
    was = {**defaults, **stored["options"]}
    rows = [
        f"\n  {key}: the run has {was.get(key)!r}, now {value!r}"
        for key, value in mine["options"].items()
        if was.get(key) != value and key not in _MAY_CHANGE
    ]
    if stored["fingerprints"] != mine["fingerprints"]:
        rows.append("\n  the cache's content is another one")
    if rows:
        raise TrainingError(
            f"{path} was begun with other options; repeat those or choose another --out. The difference:"
            + "".join(rows)
        )
