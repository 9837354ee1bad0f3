"""Interleaved timing and peak memory of a subprocess."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping


def interleaved(jobs: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job, all of them once per round, so that a noisy machine disturbs them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(base: list[float], other: list[float]) -> float:
    """Median over rounds of base / other: the speed of `other` relative to `base`."""
    return statistics.median(one / two for one, two in zip(base, other, strict=True))


def peak_megabytes(module: str, *arguments: str) -> float:
    """Peak resident memory above that before the work, of `python -m module arguments` printing JSON `{"peak_mb"}`."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])


def resident_peak() -> float:
    """This process' peak resident memory in MB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
