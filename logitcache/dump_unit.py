"""One unit of a dump: run the teacher over its blocks, encode the rows, commit them to every output that lacks it.

This is all that any engine repeats. It is idempotent: what is committed is not computed again, and of two workers with
the same unit one commits. Encoding and committing run beside the teacher's next forward pass, in a `Pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import Planes
from logitcache.dump_corpus import counted_of
from logitcache.dump_job import Job
from logitcache.dump_pipeline import Pipeline
from logitcache.selection import Selection
from logitcache.store import CacheWriter
from logitcache.targets import SparseTargets
from logitcache.teachers import BlockBatch, PendingRows

Mask = NDArray[np.bool_]
# The unit whose first chunk is the pilot that a cache's tables are counted from.
PILOT_UNIT = 0


def process_unit(
    job: Job,
    unit: int,
    pipeline: Pipeline,
    await_tables: Callable[[], object] | None = None,
    then: Callable[[], object] = lambda: None,
) -> None:
    """Compute one unit; `pipeline` encodes it and commits it to every output that lacks it.

    On return the end of that may be under way: the next unit can be begun meanwhile.

    Args:
        job: what to compute it with.
        unit: its number; `PILOT_UNIT` makes the tables that all others are encoded with.
        pipeline: the worker's, for all units.
        await_tables: returns when they are there; by default the pilot's unit is processed first.
        then: called when the unit is committed, by the pipeline's thread.

    Raises:
        ModelError: the teacher's logits are not finite, nor to be masked, or one block is too much for the memory.
        TargetsError, CacheError: rows cannot be stored, or files not written; perhaps of the unit before.
    """
    coded = _Coded(job, unit)
    if not coded.wanting:
        then()
        return
    first, stop = job.geometry.unit_range(unit)
    # Every output's chunks divide the longest ones.
    step = max(writer.geometry.chunk_blocks for writer, _ in coded.wanting)
    for begin in range(first, stop, step):
        end = min(begin + step, stop)
        tokens, counted = job.corpus.read(begin, end), _counted(job, begin, end)
        batches = _capture(job, tokens, counted, begin, coded.selections, pipeline)
        pipeline.drain()
        if unit != PILOT_UNIT and any(writer.codebook() is None for writer, _ in coded.wanting):
            # Its rows were computed while another worker made them.
            (await_tables or (lambda: process_unit(job, PILOT_UNIT, pipeline)))()
        last = then if end == stop else None
        pipeline.submit(partial(coded.add, begin, end, tokens, counted, batches, last), _told_by(job, coded))


def _told_by(job: Job, coded: _Coded) -> Callable[[int], None]:
    """What to do, in the teacher's thread, when the rows computed by now are encoded."""
    committed = job.meter.committed_later()

    def tell(num_bytes: int) -> None:
        committed(num_bytes)
        if coded.left_out and not job.said_left_out:
            job.said_left_out = True
            job.progress.note(
                "the teacher's logits are NaN or infinite at some positions; their rows are left out and counted"
            )

    return tell


class _Coded:
    """A unit's planes, chunk by chunk; after its beginning a matter of the pipeline's thread alone.

    Args:
        job, unit: as of `process_unit`.

    Attributes:
        wanting: the outputs that lack the unit, with their selections.
        left_out: rows that the teacher's logits are not finite in.
    """

    def __init__(self, job: Job, unit: int) -> None:
        self._geometry, self._unit = job.geometry, unit
        self.wanting = job.lacking(unit)
        self._chunks: list[list[Planes]] = [[] for _ in self.wanting]
        self._masks, self.left_out = job.options.nonfinite == "mask", 0

    @property
    def selections(self) -> list[Selection]:
        """Of the outputs that lack the unit."""
        return [selection for _, selection in self.wanting]

    def add(
        self,
        begin: int,
        end: int,
        tokens: NDArray[np.int64],
        counted: Mask | None,
        batches: Sequence[PendingRows],
        then: Callable[[], object] | None,
    ) -> int:
        """Encode the rows of blocks [begin, end); with a `then` they are the last: commit. Returns bytes committed."""
        count = self._geometry.tokens_in(begin, end)
        real, mask = tokens.reshape(-1)[:count], None if counted is None else counted.reshape(-1)[:count]
        parts = [SparseTargets.concatenate(part) for part in zip(*[rows() for rows in batches], strict=True)]
        if mask is not None and self._masks:
            mask, wanted = mask & ~np.isnan(parts[0].label_logprob), mask
            self.left_out += int(wanted.sum() - mask.sum())
        for (writer, _), part, planes in zip(self.wanting, parts, self._chunks, strict=True):
            planes += _encode(writer, begin, end, real, part, mask)
        if then is None:
            return 0
        counters = {"nonfinite": self.left_out} if self._masks else None
        num_bytes = sum(
            writer.commit_unit(self._unit, planes, counters)
            for (writer, _), planes in zip(self.wanting, self._chunks, strict=True)
        )
        then()
        return num_bytes


def _counted(job: Job, first: int, stop: int) -> Mask | None:
    """bool [B, L]: the positions that rows are wanted of; None for all."""
    counted = job.corpus.read_counted(first, stop)
    if counted is not None or job.options.nonfinite == "fail":
        return counted
    # Where rows may be left out the cache has a mask, and that is of positions with a next token.
    length = job.options.block_length
    return counted_of(np.arange((stop - first) * length).reshape(-1, length) < job.geometry.tokens_in(first, stop))


def _encode(
    writer: CacheWriter,
    first: int,
    stop: int,
    tokens: NDArray[np.int64],
    targets: SparseTargets,
    counted: Mask | None,
) -> list[Planes]:
    """Planes of the chunks that blocks [first, stop) make in one output."""
    geometry, planes = writer.geometry, []
    for begin in range(first, stop, geometry.chunk_blocks):
        low = geometry.tokens_in(first, begin)
        high = geometry.tokens_in(first, min(begin + geometry.chunk_blocks, stop))
        mask = None if counted is None else counted[low:high]
        planes.append(writer.encode(begin, tokens[low:high], targets.slice(low, high), mask))
    return planes


def _capture(
    job: Job,
    tokens: NDArray[np.int64],
    counted: Mask | None,
    first_block: int,
    selections: Sequence[Selection],
    pipeline: Pipeline,
) -> list[PendingRows]:
    """Rows of consecutive blocks, batch by batch."""
    batches: list[PendingRows] = []
    start = 0
    while start < tokens.shape[0]:
        pipeline.check()
        if not job.batches.trying:
            job.teacher.expect_batches(job.batches.blocks)
        batch = tokens[start : start + job.batches.blocks]
        mask = None if counted is None else counted[start : start + len(batch)]
        begin = first_block + start
        num_rows = job.geometry.tokens_in(begin, begin + len(batch))
        asked = BlockBatch(batch, begin, num_rows, selections, job.options.seed, mask, job.options.nonfinite)
        begun = job.batches.attempt(partial(job.teacher.begin_rows, asked), len(batch), begin)
        if begun is not None:
            batches.append(begun)
            start += len(batch)
            job.meter.computed_rows(num_rows)
    return batches
