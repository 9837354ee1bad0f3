"""The head's losses raced: plain PyTorch, other projects' kernels and ours; time, peak memory and gradient error.

    python -m benchmarks.kernels [--quick] [--shape V,D,N]... [--k K]... [--dtype NAME]... [--rounds R]
                                 [--essential] [--without NAME]... [--clock wall|cpu] [--save | --out FILE]

One process runs every contender once a round, by turns; times are medians over the rounds, without the first run, which
compiles; ratios are medians of the ratios within a round. 'of floor' divides by the contender's matrix products, each
as long as one forward product measured in the same round. Peak is what one forward and backward pass takes beyond
hidden states, head and targets, gradients included: torch's allocator on CUDA, resident memory on CPU. Errors are
relative Frobenius norms against float64 on the same inputs. Needs torch and this repository; whatever else is not
installed is left out with its reason.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.contenders import EAGER, contenders
from benchmarks.head_problem import BUCKET, CE, LIVE, NEEDS_K, Shape, make_problem
from benchmarks.peer_code import Missing
from benchmarks.race import MEGABYTE, Entry, Stopwatch, check, enter, race

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "axolotl")
HEADS = ((49_152, 576), (128_256, 2048), (151_936, 4096))
CPU_ROWS = (1024, 128, 64)
CUDA_ROWS = 8192
KS, MAIN_K = (16, 64, 256), 64
QUICK = Shape(8192, 256, 256)
HEADER = (
    "task", "implementation", "K", "forward ms", "forward + backward ms", "±", "of floor", "of eager", "peak MB",
    "of eager", "error dHidden", "error dWeight",
)  # fmt: skip


def shape_list(given: argparse.Namespace, device: str) -> list[Shape]:
    """The shapes to run: those asked for, or this device's."""
    if given.shape:
        return list(given.shape)
    if given.quick:
        return [QUICK]
    rows = CPU_ROWS if device == "cpu" else (CUDA_ROWS,) * len(HEADS)
    return [Shape(v, d, n) for (v, d), n in zip(HEADS, rows, strict=True)]


@dataclass(frozen=True)
class Options:
    """How everything is measured."""

    device: str
    dtype: torch.dtype
    rounds: int
    clock: str
    without: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """One shape: the entries, the milliseconds of one matrix product in every round, and why others are missing."""

    shape: Shape
    entries: list[Entry]
    products: list[float]
    missing: dict[str, str]


def run_shape(shape: Shape, ks: list[int], everything: bool, options: Options) -> Measured:
    """Measure the essential contenders at every K; with `everything` the others too, at the main K."""
    problem = make_problem(shape, max(ks), options.dtype, options.device)
    entries, missing = [], {}
    for contender in contenders():
        if not (contender.everywhere or everything) or any(name in contender.name for name in options.without):
            continue
        for k in ks if contender.task in NEEDS_K and contender.everywhere else [main_k(ks)]:
            try:
                entries.append(enter(contender, problem.with_k(k), k))
            except Missing as reason:
                missing[contender.name] = str(reason)
    products = race(entries, options.rounds, Stopwatch(options.device, options.clock))
    check(entries, options.device)
    return Measured(shape, entries, products, missing)


def main_k(ks: Sequence[int]) -> int:
    """The K at which everything runs."""
    return MAIN_K if MAIN_K in ks else ks[len(ks) // 2]


def eager_of(entry: Entry, entries: list[Entry]) -> Entry | None:
    """The plain PyTorch that does the same work: for every sparse task the sparse one."""
    task = entry.contender.task if entry.contender.task in (CE, LIVE) else BUCKET
    same = [other for other in entries if other.contender.name == EAGER and other.contender.task == task]
    return next((other for other in same if other.k == entry.k), same[0] if same else None)


def table(measured: Measured) -> str:
    """One row an entry."""
    rows = []
    for entry in measured.entries:
        eager = eager_of(entry, measured.entries)
        ratios = ["-", "-"] if eager is None else [f"{entry.ratio(eager):.2f}", f"{entry.peak / eager.peak:.2f}"]
        contender = entry.contender
        rows.append(
            [
                contender.task,
                contender.name,
                "-" if entry.k is None else str(entry.k),
                f"{statistics.median(entry.forward):.1f}",
            ]
            + [f"{entry.median:.1f}", f"{100 * entry.spread:.0f} %"]
            + [
                f"{entry.over_floor(measured.products):.2f} x {contender.products}",
                ratios[0],
                f"{entry.peak:,.0f}",
                ratios[1],
            ]
            + [f"{error:.1e}" for error in entry.errors]
        )
    return report.table(HEADER, rows)


def find(entries: list[Entry], name: str, task: str, k: int | None = None) -> Entry | None:
    """The entry whose implementation's name begins with `name`."""
    same = [one for one in entries if one.contender.task == task and (k is None or one.k == k)]
    return next((one for one in same if one.contender.name.startswith(name)), None)


def targets(measured: Measured, device: str) -> list[str]:
    """What this project set itself for real heads and batches, with the figure reached."""
    entries, k = measured.entries, main_k([entry.k for entry in measured.entries if entry.k is not None])
    eager, ours = find(entries, EAGER, BUCKET, k), find(entries, "logitcache auto", BUCKET, k)
    shape = measured.shape
    if eager is None or ours is None or shape.v < min(v for v, _ in HEADS):
        return []
    if shape.n < shape.d:
        share = eager.problem.weight_VD.nbytes / MEGABYTE / eager.peak
        return [
            f"No targets for batches of fewer rows than the head is wide: its gradient is {share:.0%} of eager's peak."
        ]
    if device == "cpu":
        split = find(entries, "logitcache split", BUCKET, k)
        pairs = [("auto", ours, 1.0, 0.45)] + ([("split", split, 1.2, 0.2)] if split else [])
        return [
            line
            for name, entry, most, peak in pairs
            for line in (
                _line(f"{name}: time of eager", entry.ratio(eager), most),
                _line(f"{name}: peak of eager", entry.peak / eager.peak, peak),
            )
        ]
    rivals = [one for one in entries if one.contender.task == CE and not one.contender.name.startswith("logitcache")]
    best = min(rivals, key=lambda one: one.median)
    error = max(mine / theirs for mine, theirs in zip(ours.errors, eager.errors, strict=True))
    return [
        _line(f"auto: time of the best CE-only kernel ({best.contender.name})", ours.ratio(best), 1.1),
        _line("auto: time of its floor", ours.over_floor(measured.products), 1.25),
        _line("auto: peak of eager", ours.peak / eager.peak, 0.1),
        _line("auto: gradient error of eager's", error, 2.0),
    ]


def _line(what: str, found: float, most: float) -> str:
    return f"- {what}: {found:.2f}, target at most {most:.2f}: {'met' if found <= most else 'missed'}"


def section(measured: Measured, options: Options) -> str:
    """One shape's table, targets and absentees."""
    shape, one = measured.shape, statistics.median(measured.products)
    rate = 2 * shape.v * shape.d * shape.n / one / 1e9
    parts = [
        f"## {shape}, {str(options.dtype).removeprefix('torch.')}",
        f"One forward product: {one:.1f} ms ({rate:,.3g} TFLOP/s).",
        table(measured),
        "\n".join(targets(measured, options.device)),
    ]
    if measured.missing:
        parts.append("Not run: " + "; ".join(f"{name}: {reason}" for name, reason in measured.missing.items()) + ".")
    return "\n\n".join(part for part in parts if part)


def parser() -> argparse.ArgumentParser:
    arguments = report.parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help="one small shape, one K, nothing compiled")
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--shape", type=Shape.parse, action="append", help="V,D,N; may be repeated")
    arguments.add_argument("--k", type=int, action="append", help="stored ids of a row; may be repeated")
    arguments.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], action="append")
    arguments.add_argument("--rounds", type=int, help="default: 3 on CPU, 20 on CUDA")
    arguments.add_argument(
        "--essential", action="store_true", help="only the sparse task, in eager PyTorch and in ours"
    )
    arguments.add_argument("--without", action="append", default=[], help="leave out names that contain this")
    arguments.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, on a busy CPU"
    )
    arguments.add_argument("--out", type=Path, help="write the result to this file")
    return arguments


def main(argv: list[str] | None = None) -> None:
    given = parser().parse_args(argv)
    warnings.simplefilter("ignore")
    device, load, started = given.device, os.getloadavg()[0], time.monotonic()
    rounds = given.rounds or (3 if device == "cpu" else 20)
    without = (*given.without, *(["compile"] if given.quick else []))
    sections = []
    for name in given.dtype or ["float32" if device == "cpu" else "bfloat16"]:
        options = Options(device, getattr(torch, name), rounds, given.clock, without)
        for place, shape in enumerate(shape_list(given, device)):
            # On a CPU everything at the large shapes would take an hour.
            large = device == "cpu" and place > 0
            ks = given.k or ([16] if given.quick else [MAIN_K] if large else list(KS))
            sections.append(section(run_shape(shape, ks, not (given.essential or large), options), options))
            torch.compiler.reset()
            print(f"{shape}: measured after {time.monotonic() - started:.0f} s", file=sys.stderr)
            # A long run that is stopped leaves what it has.
            if given.out:
                given.out.write_text("\n\n".join(sections))
    clock = "wall clock" if given.clock == "wall" else "processor time of all threads"
    intro = f"{rounds} rounds, {torch.get_num_threads()} threads, {clock}; load average at the start {load:.1f}."
    body = "\n\n".join([intro, *sections])
    report.publish("kernels", "python -m benchmarks.kernels", body, given.save, packages=PACKAGES, out=given.out)


if __name__ == "__main__":
    main()
