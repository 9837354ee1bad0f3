"""A dump of the sample into a temporary folder, with the dump's own code and a stopwatch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.dump_batches import Batches, device_clock
from logitcache.dump_job import Job, identity_of, origin_of
from logitcache.dump_options import DumpOptions, Output
from logitcache.dump_pipeline import Pipeline
from logitcache.dump_unit import process_unit
from logitcache.planning.sample import SampleCorpus
from logitcache.progress import Progress, Silent
from logitcache.selection import Selection
from logitcache.store import Cache, CacheWriter, Manifest, open_cache
from logitcache.teachers import BlockBatch, TransformersTeacher
from logitcache.teachers.capture import RowsFromLogits, capture_blocks


class RememberedBody(RowsFromLogits):
    """A teacher that computes its hidden states once, however many dumps of the same blocks ask for them.

    Attributes, of the latest dump, set to 0 by `begin`:
        remembered_seconds: that computing its hidden states took, as far as they were remembered.
        forward_seconds: that body and head take, remembered or not.
    """

    def __init__(self, teacher: TransformersTeacher) -> None:
        self._teacher = teacher
        self._known: dict[bytes, tuple[torch.Tensor, float]] = {}
        self.begin()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def begin(self) -> None:
        """Forget the times of the dump before."""
        self.remembered_seconds = self.forward_seconds = 0.0

    def hidden(self, tokens: NDArray[np.int64]) -> torch.Tensor:
        """As the teacher's."""
        key = tokens.tobytes()
        if key in self._known:
            hidden, seconds = self._known[key]
            self.remembered_seconds += seconds
        else:
            hidden, seconds = self._timed(lambda: self._teacher.hidden(tokens))
            self._known[key] = hidden, seconds
        self.forward_seconds += seconds
        return hidden

    def product(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """As the teacher's."""
        return self._head(lambda: self._teacher.product(hidden_rows))

    def finish(self, product_rows: torch.Tensor) -> torch.Tensor:
        """As the teacher's."""
        return self._head(lambda: self._teacher.finish(product_rows))

    def _head(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        made, seconds = self._timed(work)
        self.forward_seconds += seconds
        return made

    def _timed(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
        started = device_clock(self._teacher.device)
        made = work()
        return made, device_clock(self._teacher.device) - started


@dataclass(frozen=True)
class Trial:
    """What a dump of a sample took.

    Args:
        caches: of the selections, in their order.
        manifests: likewise.
        tokens: of the sample.
        forward_seconds: of a token, through body and head alone.
        seconds: of a token, capture to commit, for all selections together; not less than those.
        unit_seconds: of a unit, whatever its size.
    """

    caches: list[Cache]
    manifests: list[Manifest]
    tokens: int
    forward_seconds: float
    seconds: float
    unit_seconds: float


def warm_up(options: DumpOptions, teacher: TransformersTeacher, corpus: SampleCorpus, root: Path) -> float:
    """One block through everything, so that the first use of nothing is timed; seconds that its commit takes then."""
    root.mkdir()
    block = corpus.one()
    job = _job(options, [output.selection for output in options.outputs], teacher, block, root, Silent())
    with Pipeline() as pipeline:
        process_unit(job, 0, pipeline)
    cache = _finish(job)[0][0]
    tokens, coded = cache.read_coded(cache.chunks[0])
    again = _writer(options, options.outputs[0].selection, teacher, block, root / "again")
    again.publish_pilot(tokens, again.codec.targets(coded))
    planes = again.pack(tokens, coded)
    started = time.perf_counter()
    again.commit_unit(0, [planes])
    return time.perf_counter() - started


def find_batch(options: DumpOptions, teacher: TransformersTeacher, corpus: SampleCorpus, progress: Progress) -> int:
    """Tokens of the batches that the dump would arrive at, as far as the sample's blocks go."""
    blocks = corpus.read(0, -(-corpus.num_tokens // options.block_length))
    batches = Batches.of(options, teacher, len(blocks), progress)
    while batches.trying:
        tokens = blocks[: batches.blocks]
        batch = BlockBatch(tokens, 0, tokens.size, [], 0, nonfinite="mask")
        batches.attempt(partial(capture_blocks, teacher, batch), len(tokens), 0)
    if options.compile:
        # That takes a while, once; what is timed later is not to begin with it.
        teacher.expect_batches(batches.blocks)
        teacher.hidden(blocks[: batches.blocks])
    return batches.tokens


def dump_sample(
    options: DumpOptions,
    selections: Sequence[Selection],
    teacher: RememberedBody,
    corpus: SampleCorpus,
    root: Path,
    unit_seconds: float,
    progress: Progress,
) -> Trial:
    """Dump the sample, one cache of each selection from the same forward passes.

    Args:
        root: a folder for the caches.
        unit_seconds: that a unit takes whatever its size, of one cache.

    Raises: as a dump.
    """
    root.mkdir()
    progress.stage(f"dumping the sample with {', '.join(map(str, selections))}")
    job = _job(options, selections, teacher, corpus, root, progress)
    teacher.begin()
    started = time.perf_counter()
    with Pipeline() as pipeline:
        for unit in job.pending():
            process_unit(job, unit, pipeline)
    seconds = time.perf_counter() - started + teacher.remembered_seconds
    of_units, forward = unit_seconds * len(selections), teacher.forward_seconds
    caches, manifests = _finish(job)
    # What units take was measured at another time, perhaps of a busier machine.
    of_tokens = max(forward, seconds - of_units * job.geometry.num_units)
    tokens = corpus.num_tokens
    return Trial(caches, manifests, tokens, forward / tokens, of_tokens / tokens, of_units)


def _job(
    options: DumpOptions,
    selections: Sequence[Selection],
    teacher: Any,
    corpus: SampleCorpus,
    root: Path,
    progress: Progress,
) -> Job:
    outputs = tuple(Output(selection, root / str(number)) for number, selection in enumerate(selections))
    writers = [_writer(options, output.selection, teacher, corpus, output.root) for output in outputs]
    return Job(replace(options, outputs=outputs), teacher, corpus, writers, progress)


def _writer(options: DumpOptions, selection: Selection, teacher: Any, corpus: SampleCorpus, root: Path) -> CacheWriter:
    return CacheWriter.open(root, identity_of(options, Output(selection, root), teacher, corpus), origin_of(options))


def _finish(job: Job) -> tuple[list[Cache], list[Manifest]]:
    manifests = [writer.finalize() for writer in job.writers]
    return [open_cache(writer.layout.root) for writer in job.writers], manifests
