"""What `benchmarks.dump` runs: a bare loop of body and head, dumps with the same teacher, several of either at once."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.dump import DumpOptions, DumpReport, Output, Silent, run_dump
from logitcache.engines.local import run_local
from logitcache.selection import Selection
from logitcache.teachers import BlockBatch, TransformersTeacher
from logitcache.teachers.capture import capture_blocks


@dataclass(frozen=True)
class Problem:
    """A teacher, a corpus, and how much of it.

    Args:
        teacher, corpus: as of `DumpOptions`.
        tokens: of one dump; the bare loop takes as many.
        batch_tokens: in one forward pass.
        block_length: tokens in a block.
        dtype: of the teacher.
    """

    teacher: str
    corpus: tuple[str, ...]
    tokens: int
    batch_tokens: int
    block_length: int
    dtype: str = "float32"

    def load(self) -> TransformersTeacher:
        return TransformersTeacher.load(self.teacher, dtype=self.dtype)

    def text(self, teacher: TransformersTeacher) -> NDArray[np.int64]:
        """The first tokens of the corpus, int64 [B, L]."""
        with open(self.corpus[0], encoding="utf-8") as file:
            found = teacher.tokenizer(file.read(16 * self.tokens + 64))["input_ids"]
        blocks = self.tokens // self.block_length
        return np.array(found[: blocks * self.block_length], dtype=np.int64).reshape(blocks, self.block_length)

    def options(self, root: Path, selection: str, workers: int = 1) -> DumpOptions:
        """Of a dump; each worker has four units, so that a unit is encoded while the next is computed."""
        return DumpOptions(
            teacher=self.teacher,
            corpus=self.corpus,
            outputs=(Output(Selection.parse(selection), root),),
            dtype=self.dtype,
            block_length=self.block_length,
            max_tokens=self.tokens,
            batch_tokens=self.batch_tokens,
            workers=workers,
            unit_tokens=max(self.block_length, self.tokens // (4 * workers)),
        )


def bare_loop(teacher: TransformersTeacher, problem: Problem, share: int = 1) -> None:
    """Body and head over as many tokens, or a `share`-th of them; logits are made, slice by slice, and dropped."""
    length, blocks = problem.block_length, max(1, problem.batch_tokens // problem.block_length)
    batch = np.random.default_rng(0).integers(0, teacher.vocab_size, (blocks, length))
    left = max(1, problem.tokens // share // length)
    with torch.inference_mode():
        while left > 0:
            hidden = teacher.hidden(batch[:left])
            for rows in teacher.row_slices(hidden.shape[0]):
                teacher.logits(hidden[rows])
            left -= blocks
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def capture(teacher: TransformersTeacher, problem: Problem, selection: str) -> DumpReport:
    """One dump into a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        return run_dump(problem.options(Path(folder) / "cache", selection), teacher=teacher)


def capture_batch(teacher: TransformersTeacher, tokens_BL: NDArray[np.int64], selection: Selection) -> None:
    """The sparse rows of one batch."""
    capture_blocks(teacher, BlockBatch(tokens_BL, 0, tokens_BL.size, [selection], 0))


def workers_seconds(problem: Problem, selection: str, workers: int, context: BaseContext | None = None) -> float:
    """Seconds that several workers take for one dump; loading is not in them."""
    with tempfile.TemporaryDirectory() as folder:
        options = problem.options(Path(folder) / "cache", selection, workers)
        return run_local(options, Silent(), context).seconds


class BareProcesses:
    """Processes of one thread each, with a teacher each, that run bare loops at the same time."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def run(self) -> None:
        """Each its share of the tokens; returns when all are done."""
        for pipe in self._pipes:
            pipe.send("go")
        for pipe in self._pipes:
            pipe.recv()


@contextmanager
def bare_processes(problem: Problem, count: int, context: BaseContext | None = None) -> Iterator[BareProcesses]:
    """Start them, warm; ends them."""
    context = context or multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(count):
        mine, theirs = context.Pipe()
        process = context.Process(target=_run_bare, args=(problem, count, theirs), daemon=True)  # type: ignore[attr-defined]
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        for pipe in pipes:
            pipe.recv()
        yield BareProcesses(pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


def _run_bare(problem: Problem, count: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    teacher = problem.load()
    bare_loop(teacher, problem, count)
    try:
        while True:
            pipe.send("done")
            pipe.recv()
            bare_loop(teacher, problem, count)
    except (EOFError, ConnectionError):
        return
