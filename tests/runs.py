"""What a training run left in its folder, to compare it with another; free of pytest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def rows_of(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without wall-clock values."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def losses_of(out: Path) -> list[float]:
    """The training loss of each step that was recorded."""
    return [row["loss"] for row in rows_of(out) if "loss" in row]


def result_of(out: Path) -> dict[str, Any]:
    """result.json without wall-clock values."""
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    assert result.pop("tokens_per_second") > 0
    return result


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    """Equal in every bit."""
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name]), name
