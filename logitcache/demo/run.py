"""The demo: dump one teacher once, train the same student three times on the same tokens, compare."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from logitcache.demo.picture import draw_comparison
from logitcache.demo.resources import other_domain_text, plays, teacher_folder
from logitcache.distill import StepProgress, run_training
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.progress import Progress
from logitcache.selection import Selection
from logitcache.store import open_cache
from logitcache.training.options import TrainOptions
from logitcache.training.records import MetricsLog

TRAIN_PLAYS = ("as_you_like_it", "much_ado_about_nothing", "merchant_of_venice")
HELD_OUT_PLAYS = ("twelfth_night",)
TRAIN_TOKENS, HELD_OUT_TOKENS = 102_400, 8_192
BLOCK_LENGTH = 256
SAMPLED, TOP = "sample:25", "top-k:12"
STUDENT = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": BLOCK_LENGTH,
    "tie_word_embeddings": True,
}
TRAINING: dict[str, Any] = {
    "epochs": 1,
    "batch_tokens": 1024,
    "learning_rate": 2e-3,
    "eval_tokens": HELD_OUT_TOKENS,
    "eval_every": 25,
    "log_every": 5,
    "seed": 0,
}


@dataclass(frozen=True)
class Run:
    """One of the three trainings."""

    name: str
    title: str
    cache: str
    options: dict[str, Any]


RUNS = (
    Run("ce", "cross entropy only", "sampled", {"objective": "cross-entropy"}),
    Run("top12", f"{TOP}, renormalised", "top", {"tail": "teacher_renormalised", "alpha": 0.9}),
    Run("sampled", f"{SAMPLED}, unbiased", "sampled", {"tail": "unbiased", "alpha": 0.9}),
)


class DemoView(Protocol):
    """How the demo talks to its user."""

    def say(self, text: str) -> None:
        """One line."""

    def dumping(self, name: str) -> AbstractContextManager[Progress]:
        """Progress of a dump."""

    def training(self, name: str) -> AbstractContextManager[StepProgress]:
        """Progress of a training run."""


@dataclass(frozen=True)
class DemoResult:
    """The table's rows and the picture's path."""

    rows: list[dict[str, Any]]
    picture: Path


def run_demo(folder: Path, view: DemoView) -> DemoResult:
    """Run, or finish, the demo in `folder`. Raises LogitcacheError."""
    teacher = teacher_folder(view.say)
    works = plays(view.say)
    other = other_domain_text()
    caches = {name: folder / "caches" / name for name in ("sampled", "top", "held-out")}
    both = (Output(Selection.parse(SAMPLED), caches["sampled"]), Output(Selection.parse(TOP), caches["top"]))
    held_out = (Output(Selection.parse("top-k:64"), caches["held-out"]),)
    for title, names, outputs, tokens in (
        ("teacher on the training plays", TRAIN_PLAYS, both, TRAIN_TOKENS),
        ("teacher on a held-out play", HELD_OUT_PLAYS, held_out, HELD_OUT_TOKENS),
    ):
        options = DumpOptions(
            teacher=str(teacher),
            corpus=tuple(str(works[name]) for name in names),
            outputs=outputs,
            dtype="bfloat16",
            block_length=BLOCK_LENGTH,
            max_tokens=tokens,
            batch_tokens=2048,
        )
        with view.dumping(title) as progress:
            run_dump(options, progress)
    student = folder / "student.json"
    student.write_text(json.dumps(STUDENT, indent=1) + "\n")
    rows = [_train(run, folder, caches, student, other, view) for run in RUNS]
    picture = folder / "comparison.png"
    logs = {run.title: MetricsLog(folder / "runs" / run.name / "metrics.jsonl").rows() for run in RUNS}
    draw_comparison(logs, rows, picture)
    (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    return DemoResult(rows, picture)


def _train(
    run: Run, folder: Path, caches: dict[str, Path], student: Path, other: Path, view: DemoView
) -> dict[str, Any]:
    out = folder / "runs" / run.name
    options = TrainOptions.build(
        {
            **TRAINING,
            **run.options,
            "cache": str(caches[run.cache]),
            "held_out_cache": str(caches["held-out"]),
            "eval_text": (str(other),),
            "student": str(student),
            "out": str(out),
        }
    )
    with view.training(run.title) as step:
        metrics = run_training(options, resume=(out / "run.json").exists(), progress=step)
    cache = open_cache(caches[run.cache])
    return {
        "run": run.title,
        "held_out_ce": metrics["eval_ce"],
        "kl": metrics["eval_kl"],
        "ece": metrics["eval_ece"],
        "other_ce": metrics["eval_other_ce"],
        "bytes_per_token": None if run.name == "ce" else cache.num_bytes / cache.num_tokens,
        "tokens_per_second": metrics["tokens_per_second"],
    }
