"""Dumps against a bare body + head loop of the same teacher, and the bytes a token takes.

    python -m benchmarks.dump [--tokens 16384] [--rounds 5] [--storage-tokens 102400] [--batches] [--save]

Speed: all run the same batches in one process. Every dump runs between two bare loops and is compared with their mean;
ratios are medians over rounds, and beside them is where the middle half of the rounds lies. A dump is the whole of
`run_dump` after loading: forward, head in slices, selection, entropy, encoding, fsync and commit, in four units (one
cannot be encoded before it is computed, so the last one's encoding is never hidden). Encoding is what the
second thread does (assembling rows, encoding, compressing, fsync, commit), as a share of the dump's time, and how much
of that the teacher did not wait for.
Capture: one batch of real text through body and head, and to sparse rows; nothing is encoded. Likewise.
Workers: two processes of one thread each, beside one of two and beside two bare loops of one thread each.
Memory: peak of a process that does only the one or only the other.
Batches (--batches): the bare loop alone, with batches of several sizes.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

from benchmarks import measure, report
from benchmarks.dump_jobs import Problem, bare_loop, bare_processes, capture, capture_batch, workers_seconds
from logitcache.demo import plays, teacher_folder
from logitcache.dump import DumpOptions, DumpReport, Output, run_dump
from logitcache.selection import Selection
from logitcache.store import open_cache

BLOCK_LENGTH = 512
SELECTIONS = ("top-k:64", "sample:25")
WORKERS = 2
BATCHES = (512, 1024, 2048, 4096, 8192)
ENTRY_PLANES = ("ids", "lengths", "counts", "levels", "least", "rest", "precision")
TARGETS = "Targets: a dump >= 0.95 of the bare loop's tokens/s, peak memory <= 1.20 of its."


def demo_problem(tokens: int, batch_tokens: int, dtype: str = "float32") -> Problem:
    """SmolLM2-135M over Shakespeare."""
    corpus = tuple(str(path) for path in plays(print).values())
    return Problem(str(teacher_folder(print)), corpus, tokens, batch_tokens, BLOCK_LENGTH, dtype)


def speed(problem: Problem, rounds: int) -> list[list[str]]:
    """Rows of the table of speed: the bare loop, then dumps."""
    teacher = problem.load()
    # Once each before timing: imports, memory and threads are warm.
    bare_loop(teacher, replace(problem, tokens=min(problem.tokens, problem.batch_tokens)))
    capture(teacher, replace(problem, tokens=problem.block_length), SELECTIONS[0])
    dumps: dict[str, list[DumpReport]] = {name: [] for name in SELECTIONS}

    def dump_once(name: str) -> float:
        dumps[name].append(capture(teacher, problem, name))
        return dumps[name][-1].seconds

    bare, found = measure.beside(
        lambda: measure.seconds_of(lambda: bare_loop(teacher, problem)),
        {name: partial(dump_once, name) for name in SELECTIONS},
        rounds,
    )
    rows = [[problem.dtype, "bare body + head", _rate(problem.tokens, bare), "1.00", "", "", ""]]
    for name, one in found.items():
        share = statistics.median(done.encode_seconds / done.seconds for done in dumps[name])
        hidden = statistics.median(max(0.0, 1 - done.waited_seconds / done.encode_seconds) for done in dumps[name])
        rows.append(
            [problem.dtype, f"dump --select {name}", _rate(problem.tokens, one.seconds), one.share, one.quartiles,
             f"{share:.1%}", f"{hidden:.0%}"]
        )  # fmt: skip
    return rows


def capture_alone(problem: Problem, rounds: int) -> list[list[str]]:
    """Rows of the table of capture: one batch through body and head, and the same batch to sparse rows."""
    teacher = problem.load()
    problem = replace(problem, tokens=problem.batch_tokens)
    tokens_BL = problem.text(teacher)
    jobs = {name: partial(capture_batch, teacher, tokens_BL, Selection.parse(name)) for name in SELECTIONS}
    for job in jobs.values():
        job()
    bare, found = measure.beside(
        lambda: measure.seconds_of(lambda: bare_loop(teacher, problem)),
        {name: partial(measure.seconds_of, job) for name, job in jobs.items()},
        rounds,
    )
    rows = [[problem.dtype, "bare body + head", _rate(tokens_BL.size, bare), "1.00", ""]]
    return rows + [
        [problem.dtype, f"capture of {name}", _rate(tokens_BL.size, one.seconds),
         one.share, one.quartiles]
        for name, one in found.items()
    ]  # fmt: skip


def _rate(tokens: int, seconds: list[float]) -> str:
    return f"{tokens / statistics.median(seconds):,.0f}"


def workers(problem: Problem, rounds: int, context: BaseContext | None = None) -> list[list[str]]:
    """Rows of the table of workers."""
    teacher, selection = problem.load(), SELECTIONS[0]
    bare_loop(teacher, replace(problem, tokens=min(problem.tokens, problem.batch_tokens)))
    seconds: dict[str, list[float]] = {}
    loops, one, two = (
        f"{WORKERS} bare loops, 1 thread each",
        f"1 worker, {torch.get_num_threads()} threads",
        f"{WORKERS} workers, {max(1, torch.get_num_threads() // WORKERS)} threads each",
    )
    with bare_processes(problem, WORKERS, context) as processes:
        for _ in range(rounds):
            for name, taken in {
                "bare loop": lambda: measure.seconds_of(lambda: bare_loop(teacher, problem)),
                loops: lambda: measure.seconds_of(processes.run),
                one: lambda: capture(teacher, problem, selection).seconds,
                two: lambda: workers_seconds(problem, selection, WORKERS, context),
            }.items():
                seconds.setdefault(name, []).append(taken())
    return [
        [
            problem.dtype,
            name,
            f"{problem.tokens / statistics.median(taken):,.0f}",
            f"{measure.median_ratio(seconds['bare loop'], taken):.3f}",
            f"{measure.median_ratio(seconds[loops], taken):.3f}",
        ]
        for name, taken in seconds.items()
    ]


def batches(problem: Problem, rounds: int, sizes: Sequence[int] = BATCHES) -> list[list[str]]:
    """Rows of the table of batches: as many tokens in batches of each size."""
    teacher = problem.load()
    tokens = max(problem.tokens, *sizes)
    jobs = {
        str(size): (lambda size=size: bare_loop(teacher, replace(problem, tokens=tokens, batch_tokens=size)))
        for size in sizes
    }
    measure.interleaved(jobs, 1)
    seconds = measure.interleaved(jobs, rounds)
    usual = seconds[str(sizes[-2])]
    return [
        [problem.dtype, size, f"{tokens / statistics.median(taken):,.0f}", f"{measure.median_ratio(usual, taken):.3f}"]
        for size, taken in seconds.items()
    ]


def memory(problem: Problem, rounds: int) -> list[list[str]]:
    """Rows of the table of memory, of processes of their own; medians, for how an allocator keeps memory varies."""
    peaks = {
        name: statistics.median(
            measure.peak_megabytes("benchmarks.dump", "--one", name, "--dtype", problem.dtype,
                                   "--tokens", str(problem.tokens), "--batch-tokens", str(problem.batch_tokens))
            for _ in range(rounds)
        )
        for name in ("bare", *SELECTIONS)
    }  # fmt: skip
    return [
        [problem.dtype, name if name == "bare" else f"dump --select {name}", f"{peak:,.0f}",
         f"{peak / peaks['bare']:.2f}"]
        for name, peak in peaks.items()
    ]  # fmt: skip


def one(name: str, problem: Problem) -> None:
    """Run one job alone and print its peak memory."""
    teacher = problem.load()
    job: Callable[[], object] = (
        (lambda: bare_loop(teacher, problem)) if name == "bare" else (lambda: capture(teacher, problem, name))
    )
    measure.forget_peak()
    job()
    print(json.dumps({"peak_mb": measure.resident_peak()}))


def storage(tokens: int, keep: Path) -> list[list[str]]:
    """Bytes a token on real text, all files counted."""
    specs = ("sample:25", "sample:50", "top-k:12", "top-k:50")
    outputs = tuple(Output(Selection.parse(spec), keep / spec.replace(":", "-")) for spec in specs)
    base = demo_problem(tokens, 4096, "bfloat16").options(outputs[0].root, specs[0])
    run_dump(DumpOptions(**{**base.__dict__, "outputs": outputs, "unit_tokens": None}))
    rows = []
    for spec, output in zip(specs, outputs, strict=True):
        cache = open_cache(output.root)
        by_plane = cache.stored_bytes()
        entries = sum(by_plane.get(name, 0) for name in ENTRY_PLANES)
        count = sum(shard.num_entries for shard in cache.manifest.shards)
        side = [by_plane.get(name, 0) for name in ("tokens", "label_logprob", "entropy", "tail")]
        rest = cache.num_bytes - sum(by_plane.values()) - cache.codebook_bytes
        parts = (entries, *side, cache.codebook_bytes, rest, cache.num_bytes)
        rows.append([spec, f"{count / tokens:.1f}", *(f"{part / tokens:.2f}" for part in parts)])
    return rows


def main() -> None:
    arguments = report.parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=16_384)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--capture-rounds", type=int, default=21)
    arguments.add_argument("--batch-tokens", type=int, help="default: an eighth of --tokens, a unit of two workers")
    arguments.add_argument("--storage-tokens", type=int, default=102_400, help="0 leaves the storage table out")
    arguments.add_argument("--storage-folder", type=Path, help="keep (and resume) the storage caches here")
    arguments.add_argument("--dtypes", default="float32,bfloat16")
    arguments.add_argument("--batches", action="store_true", help="also the bare loop with batches of several sizes")
    arguments.add_argument("--one", help="internal: run one job and print its peak memory")
    arguments.add_argument("--dtype", default="float32", help="internal: of --one")
    given = arguments.parse_args()
    # No batch goes beyond a unit: the bare loop must not have larger ones.
    largest = max(BLOCK_LENGTH, given.tokens // (4 * WORKERS))
    given.batch_tokens = min(given.batch_tokens or largest, largest)
    if given.one:
        one(given.one, demo_problem(given.tokens, given.batch_tokens, given.dtype))
        return
    problems = [demo_problem(given.tokens, given.batch_tokens, dtype) for dtype in given.dtypes.split(",")]
    parts = [
        f"SmolLM2-135M, blocks of {BLOCK_LENGTH}, {given.batch_tokens} tokens a batch, {given.tokens} tokens a round, "
        f"{given.rounds} rounds, {torch.get_num_threads()} threads. {TARGETS}",
        report.table(
            ("dtype", "job", "tokens/s", "of bare", "middle half", "encoding", "of it hidden"),
            [row for problem in problems for row in speed(problem, given.rounds)],
        ),
        f"Capture alone, one batch of {given.batch_tokens} tokens, {given.capture_rounds} rounds:",
        report.table(
            ("dtype", "job", "tokens/s", "of bare", "middle half"),
            [row for problem in problems for row in capture_alone(problem, given.capture_rounds)],
        ),
        f"Dumps with {SELECTIONS[0]}:",
        report.table(
            ("dtype", "job", "tokens/s", "of the bare loop", f"of {WORKERS} bare loops"),
            [row for problem in problems for row in workers(problem, given.rounds)],
        ),
        report.table(
            ("dtype", "job", "peak MB of the process", "of bare"),
            [row for problem in problems for row in memory(problem, given.rounds)],
        ),
    ]
    if given.batches:
        rows = [row for problem in problems for row in batches(problem, given.rounds)]
        parts.append(report.table(("dtype", "tokens a batch", "tokens/s", f"of {BATCHES[-2]}"), rows))
    if given.storage_tokens:
        parts += _storage_parts(given.storage_tokens, given.storage_folder)
    report.publish("dump", "python -m benchmarks.dump", "\n\n".join(parts), given.save)


def _storage_parts(tokens: int, keep: Path | None) -> list[str]:
    folder = keep or Path(tempfile.mkdtemp())
    rows = storage(tokens, folder)
    if keep is None:
        shutil.rmtree(folder)
    header = ("select", "ids/token", "entries", "tokens", "label", "entropy", "tail", "table", "JSON and zip", "all")
    return [
        f"Storage: {tokens:,} tokens of Shakespeare, bytes per token. Targets: sample:25 <= 18 for "
        "entries (ids, weights, lengths) and <= 23 in all; top-k:50 <= 95 in all.",
        report.table(header, rows),
    ]


if __name__ == "__main__":
    main()
