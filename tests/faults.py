"""Ways to break files and processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.store.files import FAILPOINT_VARIABLE

# In the order of a dump; `tests/test_dump.py` holds that there are no others.
FAILPOINTS = (
    "plan.written",
    "codebook.written",
    "commit.before_write",
    "commit.after_write",
    "commit.after_rename",
    "commit.before_link",
    "commit.after_link",
    "manifest.before_write",
    "manifest.written",
)
_STORE = ("zarr.storage", "zarr.codecs.numcodecs", "pyarrow")
_TRAINING = ("logitcache.distill", "logitcache.cli.main", "matplotlib.pyplot")


def flip_bit(path: Path, bit: int) -> None:
    """Invert one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def random_bits(rng: np.random.Generator, path: Path, count: int) -> list[int]:
    """Distinct bit numbers inside a file."""
    return [int(bit) for bit in rng.choice(path.stat().st_size * 8, count, replace=False)]


def forkserver() -> BaseContext:
    """A process that has imported what a dump and a training run need and run nothing.

    Children start from it in milliseconds.

    Forking this process itself would copy torch's thread pools without their threads. There is one such server for
    all tests, so whoever starts it must preload the same modules.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_dump", "transformers.models.llama.modeling_llama", *_STORE, *_TRAINING])
    return context


def start(context: BaseContext, job: Callable[..., None], *arguments: Any, failpoint: str = "") -> Any:
    """Start `job` in a child that meets `failpoint`."""
    process: Any = context.Process(target=_run, args=(job, arguments, failpoint))
    process.start()
    return process


def run_killed(context: BaseContext, job: Callable[..., None], *arguments: Any, failpoint: str) -> None:
    """Run `job` in a child that is killed at `failpoint`; fails when it gets past that point."""
    process = start(context, job, *arguments, failpoint=f"{failpoint}:kill")
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"exit status {process.exitcode} instead of a kill at {failpoint}"


def run_to_end(context: BaseContext, job: Callable[..., None], *arguments: Any) -> None:
    """Run `job` in a child."""
    process = start(context, job, *arguments)
    process.join()
    assert process.exitcode == 0


def _run(job: Callable[..., None], arguments: tuple[Any, ...], failpoint: str) -> None:
    os.environ[FAILPOINT_VARIABLE] = failpoint
    job(*arguments)
