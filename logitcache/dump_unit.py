"""One unit of a dump: run the teacher over its blocks, encode the rows, commit them to every output that lacks it.

This is all that any engine repeats. It is idempotent: what is committed is not computed again, and of two workers with
the same unit one commits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.codec import Planes
from logitcache.dump_corpus import counted_of
from logitcache.dump_job import Job
from logitcache.errors import ModelError
from logitcache.selection import Selection
from logitcache.store import CacheWriter
from logitcache.targets import SparseTargets

Mask = NDArray[np.bool_]
# The unit whose first chunk is the pilot that a cache's tables are counted from.
PILOT_UNIT = 0
# How torch's allocator for CPUs says it, as a RuntimeError.
_CPU_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory")


def process_unit(job: Job, unit: int, await_tables: Callable[[], None] | None = None) -> None:
    """Compute one unit and commit it to every output that lacks it.

    Args:
        job: what to compute it with.
        unit: its number; `PILOT_UNIT` makes the tables that all others are encoded with.
        await_tables: returns when they are there; by default the pilot's unit is processed first.

    Raises:
        ModelError: the teacher's logits are not finite, nor to be masked, or one block is too much for the memory.
        TargetsError, CacheError: rows cannot be stored, or files not written.
    """
    wanting = job.lacking(unit)
    if not wanting:
        return
    geometry = job.geometry
    first, stop = geometry.unit_range(unit)
    selections = [selection for _, selection in wanting]
    chunks: list[list[Planes]] = [[] for _ in wanting]
    # Every output's chunks divide the longest ones.
    step = max(writer.geometry.chunk_blocks for writer, _ in wanting)
    left_out = 0
    for begin in range(first, stop, step):
        end = min(begin + step, stop)
        tokens, counted = job.corpus.read(begin, end), _counted(job, begin, end)
        rows = _capture(job, tokens, counted, begin, selections)
        if unit != PILOT_UNIT and any(writer.codebook() is None for writer, _ in wanting):
            # Its rows were computed while another worker made them.
            (await_tables or (lambda: process_unit(job, PILOT_UNIT)))()
        count = geometry.tokens_in(begin, end)
        real, mask = tokens.reshape(-1)[:count], None if counted is None else counted.reshape(-1)[:count]
        if mask is not None and job.options.nonfinite == "mask":
            mask, wanted = mask & ~np.isnan(rows[0].label_logprob), mask
            left_out += int(wanted.sum() - mask.sum())
            if left_out and not job.said_left_out:
                job.said_left_out = True
                job.progress.note(
                    "the teacher's logits are NaN or infinite at some positions; their rows are left out and counted"
                )
        for (writer, _), targets, planes in zip(wanting, rows, chunks, strict=True):
            planes += _encode(writer, begin, end, real, targets, mask)
    counters = {"nonfinite": left_out} if job.options.nonfinite == "mask" else None
    for (writer, _), planes in zip(wanting, chunks, strict=True):
        job.meter.committed(writer.commit_unit(unit, planes, counters))


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
    job: Job, tokens: NDArray[np.int64], counted: Mask | None, first_block: int, selections: Sequence[Selection]
) -> list[SparseTargets]:
    """Rows of consecutive blocks, batch by batch, once for each selection."""
    parts: list[list[SparseTargets]] = [[] for _ in selections]
    start = 0
    while start < tokens.shape[0]:
        batch = tokens[start : start + job.batch_blocks]
        mask = None if counted is None else counted[start : start + job.batch_blocks]
        begin = first_block + start
        num_rows = job.geometry.tokens_in(begin, begin + batch.shape[0])
        captured = _captured_or_halved(job, batch, mask, begin, num_rows, selections)
        if captured is None:
            continue
        for part, targets in zip(parts, captured, strict=True):
            part.append(targets)
        start += batch.shape[0]
        job.meter.computed_rows(num_rows)
    return [SparseTargets.concatenate(part) for part in parts]


def _captured_or_halved(
    job: Job,
    batch: NDArray[np.int64],
    mask: Mask | None,
    first_block: int,
    num_rows: int,
    selections: Sequence[Selection],
) -> list[SparseTargets] | None:
    """Rows of one batch; None where it was too much for the memory, and batches are half as large from now on."""
    try:
        return job.teacher.rows(batch, first_block, num_rows, selections, job.options.seed, mask, job.options.nonfinite)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        if batch.shape[0] == 1:
            raise ModelError(
                f"one block of {batch.shape[1]} tokens (block {first_block}) is too much for the teacher's memory; "
                "choose a shorter --block-length, --dtype bfloat16 or a device with more memory"
            ) from error
    job.batch_blocks = batch.shape[0] // 2
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not job.said_halved:
        job.said_halved = True
        job.progress.note(
            f"{batch.shape[0]} blocks at a time are too much for the teacher's memory; going on with "
            f"{job.batch_blocks} (--batch-tokens {job.batch_blocks * batch.shape[1]})"
        )
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(said in str(error) for said in _CPU_OUT_OF_MEMORY)
