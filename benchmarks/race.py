"""Times, peak memory and gradient errors of contenders that run by turns in one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch

from benchmarks import measure
from benchmarks.contenders import Contender, Job
from benchmarks.head_problem import NEEDS_K, HeadProblem, exact
from benchmarks.peer_code import Missing

MEGABYTE = 1e6


@dataclass(eq=False)
class Entry:
    """One contender on one problem, and what was measured of it.

    forward and total are milliseconds of every round; peak is megabytes beyond hidden states, head and targets;
    errors are relative Frobenius norms, of the hidden states' and the weight's gradient.
    """

    contender: Contender
    k: int | None
    problem: HeadProblem
    job: Job
    forward: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    peak: float = math.nan
    errors: tuple[float, float] = (math.nan, math.nan)
    loss: float = math.nan

    @property
    def median(self) -> float:
        """Milliseconds of forward and backward."""
        return statistics.median(self.total)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, over the median."""
        if len(self.total) < 2:
            return math.nan
        low, _, high = statistics.quantiles(self.total, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    def ratio(self, other: Entry) -> float:
        """Median over rounds of this time over the other's in the same round."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.total, other.total, strict=True))

    def over_floor(self, product: list[float]) -> float:
        """Median over rounds of this time over that of its matrix products alone."""
        count = self.contender.products
        return statistics.median(mine / (count * one) for mine, one in zip(self.total, product, strict=True))


class Stopwatch:
    """Milliseconds between marks: CUDA events on a GPU, wall clock or this process' CPU time elsewhere."""

    def __init__(self, device: str, clock: str = "wall") -> None:
        self.cuda = device == "cuda"
        self.now: Callable[[], float] = time.perf_counter if clock == "wall" else time.process_time

    def run(self, *steps: Callable[[], None]) -> list[float]:
        """Milliseconds of each step, in order."""
        if not self.cuda:
            marks = [self.now()]
            for step in steps:
                step()
                marks.append(self.now())
            return [1e3 * (after - before) for before, after in pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for step, event in zip(steps, events[1:], strict=True):
            step()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairwise(events)]


def enter(contender: Contender, problem: HeadProblem, k: int) -> Entry:
    """Make the contender's job and run it once, which compiles and warms it. Missing says why it cannot run."""
    if contender.cuda_only and not problem.hidden_ND.is_cuda:
        raise Missing("its kernels are for CUDA")
    try:
        entry = Entry(contender, k if contender.task in NEEDS_K else None, problem, contender.make(problem))
        run(entry)
    except Missing:
        raise
    except Exception as error:  # A peer may fail in any way; the table says how, and the others go on.
        raise Missing(f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]) from error
    finally:
        problem.forget_gradients()
        if problem.hidden_ND.is_cuda:
            torch.cuda.empty_cache()
    return entry


def run(entry: Entry) -> None:
    """One forward and backward pass; the gradients stay."""
    entry.problem.forget_gradients()
    loss = entry.job()
    loss.backward()
    entry.loss = float(loss.detach())


def race(entries: list[Entry], rounds: int, watch: Stopwatch) -> list[float]:
    """Time every entry once a round; returns the milliseconds of one forward matrix product, once a round too."""
    problem = entries[0].problem
    hidden_ND, weight_VD = problem.hidden_ND.detach(), problem.weight_VD.detach()
    logits_NV = hidden_ND.new_empty(len(hidden_ND), len(weight_VD))
    products: list[float] = []

    def product() -> None:
        torch.mm(hidden_ND, weight_VD.T, out=logits_NV)

    product()
    for _ in range(rounds):
        products += watch.run(product)
        for entry in entries:
            _time(entry, watch)
    return products


def _time(entry: Entry, watch: Stopwatch) -> None:
    entry.problem.forget_gradients()
    losses: list[torch.Tensor] = []
    forward, backward = watch.run(lambda: losses.append(entry.job()), lambda: losses[0].backward())
    entry.forward.append(forward)
    entry.total.append(forward + backward)
    entry.problem.forget_gradients()


def check(entries: list[Entry], device: str) -> None:
    """Peak memory of one more pass of each entry, and the errors of the gradients it leaves."""
    for task, k in dict.fromkeys((entry.contender.task, entry.k) for entry in entries):
        same = [entry for entry in entries if (entry.contender.task, entry.k) == (task, k)]
        truth = exact(same[0].problem, task)
        for entry in same:
            entry.problem.forget_gradients()
            entry.peak = _peak(entry, device)
            entry.errors = truth.errors(entry.problem)
            entry.problem.forget_gradients()


def _peak(entry: Entry, device: str) -> float:
    if device == "cpu":
        return measure.peak_beyond(partial(run, entry))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(entry)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MEGABYTE
