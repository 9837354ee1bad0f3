"""The files of a run's folder, where it is damaged or cannot be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from logitcache.errors import TrainingError
from logitcache.training.run_folder import RunFolder

RECORD: dict[str, Any] = {"options": {"alpha": 0.5}, "fingerprints": ["f"], "units": [3]}


@pytest.mark.parametrize(
    "text", ["{", "5", "[]", "{}", '{"options": 3, "fingerprints": []}', '{"options": {}}', "\xff"]
)
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    folder = RunFolder(tmp_path)
    assert folder.units is None
    with pytest.raises(TrainingError, match=r"run\.json is damaged \(.*\); choose another --out"):
        folder.find_checkpoint(RECORD, resume=True)


@pytest.mark.parametrize("text", ["", "5", "[]"])
def test_a_damaged_result_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(TrainingError, match=r"result\.json is damaged \(.*\); remove it and use --resume"):
        RunFolder(tmp_path).result()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """There is no run to go on with yet."""
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / "file" / "run")
    expected = r"run cannot be written \(.*Not a directory.*\); choose another folder"
    with pytest.raises(TrainingError, match=expected), folder.writing():
        folder.begin(RECORD, -1)


def test_a_folder_that_can_no_longer_be_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(RECORD, -1)
    assert yaml.safe_load((tmp_path / "train.yaml").read_text()) == RECORD["options"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "run.json", "train.yaml"]
    (tmp_path / "result.json").mkdir()
    with (
        pytest.raises(
            TrainingError, match=r"cannot be written \(.*\); make room there \([\d,]+ bytes are free\) and go"
        ),
        folder.writing(),
    ):
        folder.finish({"eval_ce": 1.0})
