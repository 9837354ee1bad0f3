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
from dataclasses import dataclass
from pathlib import Path

# The constant of glibc's mallopt: blocks from this size on are mapped, and unmapped as soon as they are freed.
_MMAP_THRESHOLD = -3


def interleaved(jobs: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job, all of them once per round, so that a noisy machine disturbs them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            seconds[name].append(seconds_of(job))
    return seconds


def seconds_of(job: Callable[[], object]) -> float:
    """Seconds that one run of it takes."""
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Beside:
    """A job that took turns with a base.

    Args:
        seconds: of every round.
        shares: likewise, seconds of the base over its own; those of the base are the mean of the runs right before and
            right after, so that a drift of the machine cancels.
    """

    seconds: list[float]
    shares: list[float]

    @property
    def share(self) -> str:
        """Their median."""
        return f"{statistics.median(self.shares):.3f}"

    @property
    def quartiles(self) -> str:
        """Where the middle half of the shares lies."""
        low, _, high = statistics.quantiles(self.shares, n=4, method="inclusive")
        return f"{low:.3f} to {high:.3f}"


def beside(
    base: Callable[[], float], jobs: Mapping[str, Callable[[], float]], rounds: int
) -> tuple[list[float], dict[str, Beside]]:
    """Seconds of the base, and each job beside it; all return their seconds, and the base runs between any two jobs."""
    done = [base()]
    found: dict[str, Beside] = {name: Beside([], []) for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            found[name].seconds.append(job())
            done.append(base())
            found[name].shares.append((done[-2] + done[-1]) / 2 / found[name].seconds[-1])
    return done, found


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
