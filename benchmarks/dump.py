"""Capture against a bare body + head loop of the same teacher, and the bytes a token takes.

    python -m benchmarks.dump [--tokens 8192] [--rounds 3] [--storage-tokens 102400] [--save]

Speed: both run the same batches in one process, interleaved; the ratio is the median over rounds. The capture is the
whole of `run_dump` after loading: forward, head in slices, selection, entropy, encoding, fsync and commit.
Memory: peak of a process that does only the one or only the other.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import measure, report
from logitcache.demo import plays, teacher_folder
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.selection import Selection
from logitcache.store import open_cache
from logitcache.teachers import TransformersTeacher

BLOCK_LENGTH = 512
SELECTIONS = ("top-k:64", "sample:25")
ENTRY_PLANES = ("ids", "lengths", "counts", "levels", "least", "rest", "precision")


def options(root: Path, selection: str, tokens: int, dtype: str, batch_tokens: int) -> DumpOptions:
    return DumpOptions(
        teacher=str(teacher_folder(print)),
        corpus=tuple(str(path) for path in plays(print).values()),
        outputs=(Output(Selection.parse(selection), root),),
        dtype=dtype,
        block_length=BLOCK_LENGTH,
        max_tokens=tokens,
        batch_tokens=batch_tokens,
    )


def bare_loop(teacher: TransformersTeacher, tokens: int, batch_tokens: int) -> None:
    """Body and head over the same number of tokens; the logits are made, slice by slice, and dropped."""
    batch = np.random.default_rng(0).integers(0, teacher.vocab_size, (batch_tokens // BLOCK_LENGTH, BLOCK_LENGTH))
    with torch.inference_mode():
        for _ in range(max(1, tokens // batch_tokens)):
            hidden = teacher.hidden(batch)
            for rows in teacher.row_slices(hidden.shape[0]):
                teacher.logits(hidden[rows])


def capture(teacher: TransformersTeacher, selection: str, tokens: int, dtype: str, batch_tokens: int) -> float:
    """Seconds of the capture loop of one dump into a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        done = run_dump(options(Path(folder) / "cache", selection, tokens, dtype, batch_tokens), teacher=teacher)
    return done.seconds


def load(dtype: str) -> TransformersTeacher:
    return TransformersTeacher.load(teacher_folder(print), dtype=dtype)


def speed(dtype: str, tokens: int, rounds: int, batch_tokens: int) -> list[list[str]]:
    teacher = load(dtype)
    # Once each before timing: imports, memory and threads are warm.
    bare_loop(teacher, batch_tokens, batch_tokens)
    capture(teacher, SELECTIONS[0], BLOCK_LENGTH, dtype, batch_tokens)
    bare: list[float] = []
    captured: dict[str, list[float]] = {name: [] for name in SELECTIONS}
    for _ in range(rounds):
        bare += measure.interleaved({"bare": lambda: bare_loop(teacher, tokens, batch_tokens)}, 1)["bare"]
        for name in SELECTIONS:
            captured[name].append(capture(teacher, name, tokens, dtype, batch_tokens))
    rows = [[dtype, "bare body + head", f"{tokens / statistics.median(bare):,.0f}", "1.00"]]
    for name, seconds in captured.items():
        ratio = measure.median_ratio(bare, seconds)
        rows.append([dtype, f"dump --select {name}", f"{tokens / statistics.median(seconds):,.0f}", f"{ratio:.3f}"])
    return rows


def memory(dtype: str, tokens: int, batch_tokens: int) -> list[list[str]]:
    peaks = {
        name: measure.peak_megabytes("benchmarks.dump", "--one", name, "--dtype", dtype, "--tokens", str(tokens),
                                     "--batch-tokens", str(batch_tokens))
        for name in ("bare", *SELECTIONS)
    }  # fmt: skip
    return [
        [dtype, name if name == "bare" else f"dump --select {name}", f"{peak:,.0f}", f"{peak / peaks['bare']:.2f}"]
        for name, peak in peaks.items()
    ]


def one(name: str, dtype: str, tokens: int, batch_tokens: int) -> None:
    """Run one job alone and print its peak memory."""
    teacher = load(dtype)
    job: Callable[[], object] = (
        (lambda: bare_loop(teacher, tokens, batch_tokens))
        if name == "bare"
        else (lambda: capture(teacher, name, tokens, dtype, batch_tokens))
    )
    measure.forget_peak()
    job()
    print(json.dumps({"peak_mb": measure.resident_peak()}))


def storage(tokens: int, keep: Path) -> list[list[str]]:
    """Bytes a token on real text, all files counted."""
    specs = ("sample:25", "sample:50", "top-k:12", "top-k:50")
    outputs = tuple(Output(Selection.parse(spec), keep / spec.replace(":", "-")) for spec in specs)
    base = options(outputs[0].root, specs[0], tokens, "bfloat16", 4096)
    run_dump(DumpOptions(**{**base.__dict__, "outputs": outputs}))
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
    arguments.add_argument("--tokens", type=int, default=8192)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--batch-tokens", type=int, default=4096)
    arguments.add_argument("--storage-tokens", type=int, default=102_400, help="0 leaves the storage table out")
    arguments.add_argument("--storage-folder", type=Path, help="keep (and resume) the storage caches here")
    arguments.add_argument("--dtypes", default="float32,bfloat16")
    arguments.add_argument("--one", help="internal: run one job and print its peak memory")
    arguments.add_argument("--dtype", default="float32", help="internal: of --one")
    given = arguments.parse_args()
    if given.one:
        one(given.one, given.dtype, given.tokens, given.batch_tokens)
        return
    dtypes = given.dtypes.split(",")
    speeds = [row for dtype in dtypes for row in speed(dtype, given.tokens, given.rounds, given.batch_tokens)]
    peaks = [row for dtype in dtypes for row in memory(dtype, given.tokens, given.batch_tokens)]
    parts = [
        f"SmolLM2-135M, blocks of {BLOCK_LENGTH}, {given.batch_tokens} tokens a batch, {given.tokens} tokens a round, "
        f"{given.rounds} rounds. Target: capture >= 0.90 of the bare loop, peak memory <= 1.20 of its.",
        report.table(("dtype", "job", "tokens/s", "of bare"), speeds),
        report.table(("dtype", "job", "peak MB of the process", "of bare"), peaks),
    ]
    if given.storage_tokens:
        folder = given.storage_folder or Path(tempfile.mkdtemp())
        rows = storage(given.storage_tokens, folder)
        if given.storage_folder is None:
            shutil.rmtree(folder)
        parts += [
            f"Storage: {given.storage_tokens:,} tokens of Shakespeare, bytes per token. Targets: sample:25 <= 18 for "
            "entries (ids, weights, lengths) and <= 23 in all; top-k:50 <= 95 in all.",
            report.table(
                (
                    "select",
                    "ids/token",
                    "entries",
                    "tokens",
                    "label",
                    "entropy",
                    "tail",
                    "table",
                    "JSON and zip",
                    "all",
                ),
                rows,
            ),
        ]
    report.publish("dump", "python -m benchmarks.dump", "\n\n".join(parts), given.save)


if __name__ == "__main__":
    main()
