"""Interleaved timing and peak memory of a subprocess."""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

# The constant of glibc's mallopt: blocks from this size on are mapped, and unmapped as soon as they are freed.
_MMAP_THRESHOLD = -3


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
    """What `python -m module arguments` prints last: JSON `{"peak_mb": ...}`."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])


def forget_peak() -> None:
    """Start the peak of resident memory anew, so that loading does not count (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> float:
    """This process' peak resident memory in MB since `forget_peak`."""
    return _status("VmHWM")


def _status(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) / 1024


def peak_beyond(job: Callable[[], object]) -> float:
    """Most megabytes (10^6 bytes) that were resident during `job`, beyond those before it (Linux).

    Freed memory that the allocator keeps would hide, or seem to be, what the job takes. So it is given back first, and
    during the job glibc gives back every freed block of a megabyte at once.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    glibc = hasattr(libc, "malloc_trim")
    if glibc:
        libc.malloc_trim(0)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
    forget_peak()
    before = _status("VmRSS")
    job()
    peak = resident_peak()
    if glibc:
        # What glibc's own adjustment arrives at in a process with large blocks.
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
    return (peak - before) * 1.024**2
