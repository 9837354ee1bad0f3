"""Cached distillation against the same trainer on cross entropy alone: speed and peak memory.

    python -m benchmarks.train [--steps 6] [--rounds 3] [--save]

One process trains the same student on the same tokens with cross entropy only, with sample:25 (unbiased) and with
top-k:64 (tail bucket), interleaved round by round; tokens/s are those of whole optimiser steps, reading included.
Memory: peak of a process that does only one of them. Everything uses the split head.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers

from benchmarks import measure, report
from logitcache.demo import plays, teacher_folder
from logitcache.demo.run import STUDENT
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.losses import Objective
from logitcache.reader import CacheDataset, ReaderOptions
from logitcache.selection import Selection
from logitcache.store import open_cache
from logitcache.training import AlphaSchedule, DistillationSettings, DistillationTrainer
from logitcache.training.load import load_student

BLOCK_LENGTH, BATCH_BLOCKS = 256, 8
JOBS = {
    "cross entropy only": ("sample-25", Objective.cross_entropy()),
    "sample:25, unbiased": ("sample-25", Objective.forward_kl("unbiased")),
    "top-k:64, tail bucket": ("top-k-64", Objective.forward_kl("bucket")),
}


def make_caches(folder: Path, tokens: int) -> None:
    """The caches to train from, of real text."""
    outputs = tuple(
        Output(Selection.parse(spec), folder / spec.replace(":", "-")) for spec in ("sample:25", "top-k:64")
    )
    corpus = tuple(str(path) for path in plays(print).values())
    run_dump(
        DumpOptions(
            str(teacher_folder(print)), corpus, outputs, dtype="bfloat16", block_length=BLOCK_LENGTH, max_tokens=tokens
        )
    )


def train(folder: Path, name: str, steps: int) -> None:
    """One short run."""
    cache_name, objective = JOBS[name]
    cache = open_cache(folder / cache_name)
    config = folder / "student.json"
    config.write_text(json.dumps(STUDENT))
    settings = DistillationSettings(objective, AlphaSchedule(), unbiased=cache.unbiased)
    dataset = CacheDataset(cache, ReaderOptions(BATCH_BLOCKS, with_targets=not settings.labels_only))
    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(
            output_dir=out, max_steps=steps, use_cpu=not _cuda(), report_to=[], disable_tqdm=True, save_strategy="no",
            logging_steps=steps, remove_unused_columns=False,
        )  # fmt: skip
        trainer = DistillationTrainer(load_student(str(config), cache, None, 0), arguments, dataset, settings)
        for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
            trainer.remove_callback(callback)
        waiting = Waiting(dataset)
        trainer.add_callback(waiting)
        RATES.setdefault(name, []).append(_rate(trainer))
        WAITS.setdefault(name, []).append(waiting.share())


RATES: dict[str, list[float]] = {}
WAITS: dict[str, list[float]] = {}


class Waiting(transformers.TrainerCallback):
    """The share of steps, from the second one on, that training waits for a batch."""

    def __init__(self, dataset: CacheDataset) -> None:
        self._dataset = dataset
        self._marks: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._marks.append((time.perf_counter(), self._dataset.count.waited_seconds))

    def share(self) -> float:
        (began, waited), (ended, waited_at_end) = self._marks[0], self._marks[-1]
        return (waited_at_end - waited) / (ended - began)


def _rate(trainer: Any) -> float:
    trainer.train()
    return float(next(row["tokens_per_second"] for row in trainer.state.log_history if "tokens_per_second" in row))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    arguments = report.parser(__doc__)
    arguments.add_argument("--steps", type=int, default=6)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--cache-tokens", type=int, default=16_384)
    report.add_folder(arguments)
    arguments.add_argument("--one", choices=list(JOBS), help="internal: run one job and print its peak memory")
    given = arguments.parse_args()
    if given.one:
        measure.forget_peak()
        train(given.folder, given.one, given.steps)
        print(json.dumps({"peak_mb": measure.resident_peak()}))
        return
    with report.kept_or_scratch(given.folder) as folder:
        make_caches(folder, given.cache_tokens)
        train(folder, "cross entropy only", 2)
        RATES.clear()
        WAITS.clear()
        for _ in range(given.rounds):
            for name in JOBS:
                train(folder, name, given.steps)
        base_name = next(iter(JOBS))
        peaks = {
            name: measure.peak_megabytes(
                "benchmarks.train", "--one", name, "--folder", str(folder), "--steps", str(given.steps)
            )
            for name in JOBS
        }
    rows = []
    for name, rates in RATES.items():
        ratio = statistics.median(mine / base for mine, base in zip(rates, RATES[base_name], strict=True))
        rows.append(
            [name, f"{statistics.median(rates):,.0f}", f"{ratio:.3f}", f"{peaks[name]:,.0f}",
             f"{peaks[name] / peaks[base_name]:.2f}", f"{statistics.median(WAITS[name]):.2%}"]
        )  # fmt: skip
    shape = f"{STUDENT['num_hidden_layers']} layers, d {STUDENT['hidden_size']}, vocabulary 49,152"
    body = (
        f"Student: {shape}; batches of {BATCH_BLOCKS} x {BLOCK_LENGTH} tokens, {given.steps} steps a round, "
        f"{given.rounds} rounds. Targets: >= 0.90 of cross entropy's tokens/s, peak memory <= 1.20 of its, waiting "
        "< 2 % of a step.\n\n"
        + report.table(("trained on", "tokens/s", "of CE only", "peak MB", "of CE only", "waiting"), rows)
    )
    report.publish("train", "python -m benchmarks.train", body, given.save)


if __name__ == "__main__":
    main()
