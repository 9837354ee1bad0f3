"""One student from a cache, with a live teacher, and on cross entropy alone: tokens/s, peak memory, break-even.

    python -m benchmarks.offline_vs_live [--steps 3] [--rounds 3] [--save]

The same student on the same tokens minimises (1 - 0.9) * CE + 0.9 * KL(teacher || student). tokens/s are those of
whole optimiser steps, opening the reader and reading included, by turns in one process; a dump of as many tokens takes
its turn too. Memory: peak of a process that does only one of them. Student in float32 (bfloat16 autocast on CUDA),
teacher in bfloat16. With --teacher, --corpus and --student other models and text than the demo's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, report
from benchmarks.offline_training import (
    BLOCK_LENGTH,
    CACHED,
    CE,
    DENSE,
    DUMPS,
    SAMPLED,
    SLICED,
    WAYS,
    Setting,
    Training,
    peak_of_one,
    time_all,
)
from logitcache.demo import plays, teacher_folder
from logitcache.demo.run import STUDENT
from logitcache.planning.break_even import Costs

EPOCHS, STUDENTS = (1, 2, 4), (1, 2, 4, 8)
TARGET = 0.95


def speed_table(setting: Setting, seconds: dict[str, list[float]], peaks: dict[str, float]) -> str:
    """Speed and memory, with cross entropy alone as the measure."""
    base = seconds[CE]
    rows = []
    for name, mine in seconds.items():
        ratio = measure.median_ratio(base, mine)
        met = f"{TARGET:g}: {'yes' if ratio >= TARGET else 'NO'}" if name in CACHED.values() else "-"
        peak = [f"{peaks[name]:,.0f}", f"{peaks[name] / peaks[CE]:.2f}"] if peaks else ["-", "-"]
        rows.append([name, f"{1 / statistics.median(mine):,.0f}", f"{ratio:.3f}", met, *peak])
    kind = "MiB allocated" if setting.device == "cuda" else "MiB of the process"
    return report.table(("", "tokens/s", "of CE only", "target, met", f"peak {kind}", "of CE only"), rows)


def costs(seconds: dict[str, list[float]], selection: str, live: str) -> list[Costs]:
    """Of a cache and a live teacher, round by round."""
    columns = (seconds[f"dump {selection}"], seconds[CACHED[selection]], seconds[live])
    return [Costs(*one) for one in zip(*columns, strict=True)]


def break_even_table(seconds: dict[str, list[float]]) -> str:
    """The number of students from which on the cache takes less time, and how much less for some numbers of them."""
    rows = []
    for selection in CACHED:
        for live in (DENSE, SLICED):
            rounds = costs(seconds, selection, live)
            counts = [statistics.median(one.students(epochs) for one in rounds) for epochs in EPOCHS]
            gains = [statistics.median(one.speed_up(students) for one in rounds) for students in STUDENTS]
            gains.append(statistics.median(one.live / one.cached for one in rounds))
            cells = ("never" if math.isinf(value) else f"{value:.2f}" for value in (*counts, *gains))
            rows.append([selection, live, *cells])
    epochs = (f"n, E = {epochs}" for epochs in EPOCHS)
    students = (f"gain, n = {students}" for students in STUDENTS)
    return report.table(("cache", "instead of", *epochs, *students, "gain, dump not counted"), rows)


def storage_table(setting: Setting, seconds: dict[str, list[float]]) -> str:
    """Bytes of the caches that were trained from, beside what else one could keep."""
    rows = []
    for selection, name in CACHED.items():
        cache = setting.cache(selection)
        size, dense = cache.num_bytes / cache.num_tokens, 2 * cache.vocab_size
        rate = size / statistics.median(seconds[name]) / 1e3
        rows.append([selection, f"{size:.1f}", f"{size:,.1f} GB", f"1 / {dense / size:,.0f}", f"{rate:,.1f} kB/s"])
    return report.table(
        ("cache", "bytes/token", "of 10^9 tokens", "of dense float16 logits", "read while training"), rows
    )


def body(
    setting: Setting, models: tuple[Any, Any], seconds: dict[str, list[float]], peaks: dict[str, float], steps: int
) -> str:
    """The whole report; `models` are teacher and student."""
    teacher, student = (_size(model) for model in models)
    clock = "processor time" if setting.clock is time.process_time else "wall clock"
    kind = "bfloat16 autocast" if setting.device == "cuda" else "float32"
    parts = [
        f"Teacher: {teacher}, bfloat16. Student: {student}, {kind}. On {setting.device}, {torch.get_num_threads()} "
        f"threads, {clock}, load average {os.getloadavg()[0]:.1f}; batches of {setting.batch_blocks} x {BLOCK_LENGTH} "
        f"tokens, {steps} steps a round, {len(seconds[CE])} rounds; ratios are medians over rounds.",
        speed_table(setting, seconds, peaks),
        "'Dense logits' are two transformers models and PyTorch's losses, as usually written. 'In slices' makes both "
        "heads' logits a slice of rows at a time, and the gradient with them: no fewer matrix products are possible, "
        "and no [B, L, V] exists.",
        "## Break-even\n\nn students, each of which reads the corpus E times, in seconds per token: "
        "`dump + n * E * cached = n * E * live`, so `n = dump / (E * (live - cached))`. Below 1 the first student "
        "already gains. Gain: time with a live teacher over time with the cache, its dump included, E = 1.",
        break_even_table(seconds),
        f"## Storage\n\nOf the caches trained from, all files counted: {setting.cache(SAMPLED).num_tokens:,} tokens. "
        "Larger ones need fewer bytes a token.",
        storage_table(setting, seconds),
    ]
    return "\n\n".join(parts)


def _size(model: Any) -> str:
    config = model.config.get_text_config()
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"{millions:,.3g} M parameters ({config.num_hidden_layers} layers, d {config.hidden_size}, vocabulary "
        f"{config.vocab_size:,})"
    )


def parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    arguments = report.parser(__doc__)
    arguments.add_argument("--steps", type=int, default=50 if cuda else 3, help="in a round")
    arguments.add_argument("--rounds", type=int, default=5 if cuda else 3)
    arguments.add_argument("--batch-blocks", type=int, default=32 if cuda else 8, help=f"of {BLOCK_LENGTH} tokens")
    arguments.add_argument("--cache-tokens", type=int, default=262_144 if cuda else 16_384)
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    arguments.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time of all threads, on a busy CPU"
    )
    arguments.add_argument("--teacher", type=Path, help="folder of a teacher; by default the demo's")
    arguments.add_argument("--corpus", nargs="+", help="text files; by default the demo's")
    arguments.add_argument("--student", type=Path, help="file of a transformers config; by default the demo's")
    arguments.add_argument("--folder", type=Path, help="keep (and find again) the caches here")
    arguments.add_argument("--no-memory", action="store_true", help="leave the peaks of memory out")
    arguments.add_argument("--one", choices=[*WAYS, *DUMPS], help="internal: print the peak memory of one of them")
    return arguments


def setting_of(given: argparse.Namespace, folder: Path) -> Setting:
    """Everything that is not given is the demo's."""
    student = given.student or folder / "student.json"
    if given.student is None:
        student.write_text(json.dumps(STUDENT))
    return Setting(
        teacher=given.teacher or teacher_folder(print),
        corpus=tuple(given.corpus or (str(path) for path in plays(print).values())),
        student=student,
        folder=folder,
        batch_blocks=given.batch_blocks,
        device=given.device,
        clock=time.process_time if given.clock == "cpu" else time.perf_counter,
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    given = parser().parse_args(argv)
    if given.one:
        print(json.dumps({"peak_mb": peak_of_one(given.one, setting_of(given, given.folder), given.steps)}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        setting = setting_of(given, folder)
        outputs = {selection: folder / selection.replace(":", "-") for selection in CACHED}
        teacher = setting.load_teacher()
        setting.dump(outputs, given.cache_tokens, teacher)
        seconds = time_all(setting, teacher, given.steps, given.rounds)
        peaks: dict[str, float] = {}
        if not given.no_memory:
            # Later options win: a second step needs the optimiser's state too, more steps need no more.
            again = [*argv, "--steps", "2", "--folder", str(folder)]
            peaks = {
                name: measure.peak_megabytes("benchmarks.offline_vs_live", *again, "--one", name) for name in seconds
            }
        models = teacher.model, Training(WAYS[CE], setting, None).student
        text = body(setting, models, seconds, peaks, given.steps)
    report.publish("offline_vs_live", "python -m benchmarks.offline_vs_live", text, given.save)


if __name__ == "__main__":
    main()
