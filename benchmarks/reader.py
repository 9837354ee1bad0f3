"""How fast caches become batches, how long training waits for them, what memory that takes, how well they are shuffled.

    python -m benchmarks.reader [--tokens 1048576] [--rounds 5] [--folder DIR] [--save]

Caches are of random rows (benchmarks/synthetic.py). Every figure is of whole epochs in batches of 8 blocks of 512
tokens, as packed buffers, by a process that does nothing else. Cold: the files' pages are dropped (posix_fadvise) and
the cache opened anew, so that disk and the shards' hashes count. Warm: the best epoch, as what else the machine does
can only add to it. Processor time is that of all threads.

Waiting: the share of time, from the second batch to the end of an epoch, that steps which only sleep, as a thread does
while a GPU works, wait for their batch; `python -m benchmarks.train` has that of a real training on a CPU. Memory: peak
beyond that of the process, for caches of which one is four times as large.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.measure import peak_beyond, peak_megabytes
from benchmarks.synthetic import make_cache
from logitcache.reader import CacheDataset, ReaderOptions, shuffle_quality
from logitcache.store import Cache, open_cache

BATCH_BLOCKS, EPOCHS = 8, 32
SELECTIONS = (("sample", 25), ("top-k", 64))
VARIANTS = (("fast", "zarr"), ("fast", "arrow"), ("small", "zarr"), ("small", "arrow"))
TARGETS = {"sample": 5.0, "top-k": 1.0}
# Million tokens a second of a training that waits for its batches.
STEP_RATES = (0.1, 0.25, 0.5, 1.0)
LARGER = 4


@dataclass(frozen=True)
class Rate:
    """Million tokens a second, nanoseconds of processor time a token, and chunks held at most."""

    rate: float
    nanoseconds: float
    chunks: int


def one_reader(root: Path, rounds: int, **options: Any) -> tuple[Rate, Rate]:
    """Cold, and the best of warm epochs, in this process."""
    drop_pages(root)
    dataset = CacheDataset(open_cache(root), ReaderOptions(BATCH_BLOCKS, **options))
    stream = iter(dataset)
    epochs = [_epoch(stream, dataset) for _ in range(1 + rounds)]
    fastest, leanest = max(epoch.rate for epoch in epochs[1:]), min(epoch.nanoseconds for epoch in epochs[1:])
    return epochs[0], Rate(fastest, leanest, dataset.count.chunks.most_held)


def _epoch(stream: Any, dataset: CacheDataset) -> Rate:
    tokens, began, busy = 0, time.perf_counter(), time.process_time()
    for _ in range(dataset.order.num_blocks // BATCH_BLOCKS):
        tokens += next(stream).layout.rows
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    return Rate(tokens / seconds / 1e6, busy / tokens * 1e9, dataset.count.chunks.most_held)


def drop_pages(root: Path) -> None:
    """Have the system forget a cache's files; they were synced when they were written."""
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def readers(root: Path, count: int, rounds: int, **options: Any) -> list[tuple[Rate, Rate]]:
    """`count` processes at once, each reading the whole cache."""
    command = [sys.executable, "-m", "benchmarks.reader", "--one", str(root), "--rounds", str(rounds)]
    running = [
        subprocess.Popen([*command, "--options", json.dumps(options)], stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    return [_rates(process) for process in running]


def _rates(process: subprocess.Popen[str]) -> tuple[Rate, Rate]:
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a reader failed with status {process.returncode}")
    cold, warm = json.loads(printed.splitlines()[-1])
    return Rate(**cold), Rate(**warm)


def _row(method: str, name: str, order: str, found: list[tuple[Rate, Rate]]) -> list[str]:
    cold, warm = (sum(one[which].rate for one in found) for which in (0, 1))
    cost = statistics.mean(warm.nanoseconds for _, warm in found)
    target = TARGETS[method] if "fast" in name and len(found) == 1 else None
    met = "-" if target is None else f"{target:g}: {'yes' if warm >= target else 'NO'}"
    return [name, order, str(len(found)), f"{cold:.2f}", f"{warm:.2f}", f"{cost:,.0f}", f"{1e3 / cost:.2f}", met,
            str(max(warm.chunks for _, warm in found))]  # fmt: skip


def measure(folder: Path, tokens: int, rounds: int) -> list[list[str]]:
    """Rows of the table."""
    rows = []
    for method, size in SELECTIONS:
        for layout, container in VARIANTS:
            root = folder / f"{method}-{size}-{layout}-{container}-{tokens}"
            cache = make_cache(root, method, size, layout, container, tokens)  # type: ignore[arg-type]
            ids = sum(shard.num_entries for shard in cache.manifest.shards) / cache.num_tokens
            name = f"{method}:{size} ({ids:.0f} ids), {layout}, {container}"
            plain = (layout, container) == VARIANTS[0]
            for order, count in (("shuffled", 1), ("sequential", 1), ("shuffled", 2)) if plain else (("shuffled", 1),):
                found = readers(root, count, rounds, shuffle=order == "shuffled")
                rows.append(_row(method, name, order, found))
    return rows


def waiting_share(root: Path, rate: float) -> float:
    """Share of an epoch's time that steps of a training of `rate` million tokens a second wait for batches."""
    cache = open_cache(root)
    dataset = CacheDataset(cache, ReaderOptions(BATCH_BLOCKS))
    stream = iter(dataset)
    next(stream)
    began, waited = time.perf_counter(), dataset.count.waited_seconds
    for _ in range(dataset.order.num_blocks // BATCH_BLOCKS - 1):
        time.sleep(BATCH_BLOCKS * cache.block_length / rate / 1e6)
        next(stream)
    return (dataset.count.waited_seconds - waited) / (time.perf_counter() - began)


def waiting_rows(folder: Path, tokens: int) -> list[list[str]]:
    """Of every cache in Zarr files, and every rate."""
    rows = []
    for method, size in SELECTIONS:
        for layout in ("fast", "small"):
            root = folder / f"{method}-{size}-{layout}-zarr-{tokens}"
            rows.append([f"{method}:{size}, {layout}", *(f"{waiting_share(root, rate):.1%}" for rate in STEP_RATES)])
    return rows


def epoch_peak(root: Path) -> float:
    """Peak megabytes of opening a cache and reading it once, beyond those of the process before."""

    def read() -> None:
        dataset = CacheDataset(open_cache(root), ReaderOptions(BATCH_BLOCKS))
        for _ in zip(range(dataset.order.num_blocks // BATCH_BLOCKS), dataset, strict=False):
            pass

    return peak_beyond(read)


def memory_rows(folder: Path, tokens: int) -> list[list[str]]:
    """Of the first selection's cache, and of one that is LARGER times as large."""
    method, size = SELECTIONS[0]
    layout, container = VARIANTS[0]
    rows = []
    for count in (tokens, LARGER * tokens):
        root = folder / f"{method}-{size}-{layout}-{container}-{count}"
        cache = make_cache(root, method, size, layout, container, count)  # type: ignore[arg-type]
        peak = peak_megabytes("benchmarks.reader", "--memory", str(root))
        rows.append([f"{method}:{size}, {layout}", f"{count:,}", f"{cache.num_bytes / 1e6:,.0f}", f"{peak:,.0f}"])
    return rows


def shuffle_rows(cache: Cache) -> list[list[str]]:
    """Of this cache's order, and of full permutations: root mean square and mean over epochs."""
    order = CacheDataset(cache, ReaderOptions(BATCH_BLOCKS)).order
    rng = np.random.default_rng(0)
    orders = {
        "the reader's order": [order.epoch(epoch) for epoch in range(EPOCHS)],
        "full permutations": [rng.permutation(order.num_blocks) for _ in range(EPOCHS)],
    }
    rows = []
    for name, epochs in orders.items():
        found = [shuffle_quality(blocks) for blocks in epochs]
        correlation = statistics.mean(one.rank_correlation**2 for one in found) ** 0.5
        rows.append([name, f"{correlation:.3f}", f"{statistics.mean(one.neighbour_distance for one in found):.3f}"])
    return rows


def main() -> None:
    arguments = report.parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=1 << 20)
    arguments.add_argument("--rounds", type=int, default=7)
    report.add_folder(arguments)
    arguments.add_argument("--one", type=Path, help="internal: read this cache and print its rates")
    arguments.add_argument("--memory", type=Path, help="internal: read this cache and print the peak memory")
    arguments.add_argument("--options", type=json.loads, default={}, help="internal")
    given = arguments.parse_args()
    if given.one:
        print(json.dumps([vars(rate) for rate in one_reader(given.one, given.rounds, **given.options)]))
        return
    if given.memory:
        print(json.dumps({"peak_mb": epoch_peak(given.memory)}))
        return
    with report.kept_or_scratch(given.folder) as folder:
        rows = measure(folder, given.tokens, given.rounds)
        waiting = waiting_rows(folder, given.tokens)
        memory = memory_rows(folder, given.tokens)
        quality = shuffle_rows(open_cache(folder / f"sample-25-fast-zarr-{given.tokens}"))
    body = "\n\n".join(
        [
            f"{given.tokens:,} tokens, the best of {given.rounds} warm epochs. Mtok/s are those of all readers "
            f"together. The machine also did other things: its load was {os.getloadavg()[0]:.1f}.",
            report.table(
                ("cache", "order", "readers", "cold Mtok/s", "warm Mtok/s", "processor ns/token",
                 "Mtok per processor second", "target, met", "chunks held"),
                rows,
            ),
            "Waiting for batches, in Zarr files, where training takes so many Mtok/s. Target: < 2 % of a step.",
            report.table(("cache", *(f"{rate:g} Mtok/s" for rate in STEP_RATES)), waiting),
            "Memory of an epoch with one reader, beyond that of the process.",
            report.table(("cache", "tokens", "stored MB", "peak MB"), memory),
            f"Over {EPOCHS} epochs: root mean square of the rank correlation of stored and read order, how far apart "
            "neighbours are stored relative to a full permutation's expectation.",
            report.table(("order", "rank correlation", "neighbour distance"), quality),
        ]
    )  # fmt: skip
    report.publish("reader", "python -m benchmarks.reader", body, given.save)


if __name__ == "__main__":
    main()
