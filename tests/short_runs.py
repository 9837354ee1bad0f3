"""A short training run: its options, and what two equal ones have in common; free of pytest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from logitcache.distill import run_training
from logitcache.training.options import TrainOptions
from tests.caches import BLOCK_LENGTH, Dumped
from tests.runs import assert_same_weights, result_of, rows_of

STEPS = 8


def eight_steps(dumped: Dumped, student: Path, out: Path) -> dict[str, Any]:
    """Options of a run of 8 steps with a checkpoint after every second."""
    return {
        "cache": str(dumped.top_k),
        "student": str(student),
        "out": str(out),
        "max_steps": STEPS,
        "batch_tokens": 4 * BLOCK_LENGTH,
        "log_every": 2,
        "save_every": 2,
        "eval_every": 4,
        "learning_rate": 1e-2,
        "device": "cpu",
    }


def train(values: dict[str, Any], resume: bool = False, progress: Any = None, **changes: Any) -> dict[str, Any]:
    return run_training(TrainOptions.build(values | changes), resume, progress)


def assert_same_run(one: Path, other: Path) -> None:
    """Equal in every bit: metrics, weights, config, tokenizer and result."""
    assert rows_of(one) == rows_of(other)
    assert result_of(one) == result_of(other)
    assert_same_weights(one, other)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())
