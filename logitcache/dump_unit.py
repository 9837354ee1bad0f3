"""One unit of a dump: run the teacher over its blocks, encode the rows, commit them to every output that lacks it.

This is all that any engine repeats. It is idempotent: what is committed is not computed again, and of two workers with
the same unit one commits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import Planes
from logitcache.dump_corpus import Corpus
from logitcache.dump_options import DumpOptions
from logitcache.progress import Progress
from logitcache.selection import Selection
from logitcache.store import CacheWriter, Geometry
from logitcache.targets import SparseTargets
from logitcache.teachers import TransformersTeacher
from logitcache.teachers.capture import capture_blocks


class Meter:
    """Counts tokens and bytes and passes them on."""

    def __init__(self, geometry: Geometry, todo: Sequence[int], progress: Progress) -> None:
        self._total, self._progress = geometry.num_tokens, progress
        self._before = self._total - sum(geometry.tokens_in(*geometry.unit_range(unit)) for unit in todo)
        self.computed = self._bytes = 0

    def computed_rows(self, rows: int) -> None:
        """So many tokens went through the teacher."""
        self.computed += rows
        self._tell()

    def committed(self, num_bytes: int) -> None:
        """So many bytes were committed."""
        self._bytes += num_bytes
        self._tell()

    def _tell(self) -> None:
        self._progress.advance(self._before + self.computed, self._total, self.computed, self._bytes)


@dataclass
class Job:
    """What a worker needs for every unit.

    Args:
        options: of the dump.
        teacher: loaded.
        corpus: its token blocks.
        writers: of the outputs, in their order.
        meter: told of what is done.
    """

    options: DumpOptions
    teacher: TransformersTeacher
    corpus: Corpus
    writers: list[CacheWriter]
    meter: Meter

    @property
    def geometry(self) -> Geometry:
        """Tokens, blocks and units, which all outputs share."""
        return self.writers[0].geometry

    def lacking(self, unit: int) -> list[tuple[CacheWriter, Selection]]:
        """The outputs that `unit` is not committed to."""
        outputs = zip(self.writers, self.options.outputs, strict=True)
        return [(writer, output.selection) for writer, output in outputs if not writer.is_committed(unit)]


def pending_units(writers: Sequence[CacheWriter]) -> list[int]:
    """Units that at least one output lacks, ascending."""
    return sorted(set().union(*(writer.pending_units() for writer in writers)))


def process_unit(job: Job, unit: int) -> None:
    """Compute one unit and commit it to every output that lacks it.

    Raises:
        ModelError: the teacher's logits are not finite.
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
    for begin in range(first, stop, step):
        end = min(begin + step, stop)
        tokens = job.corpus.read(begin, end)
        rows = _capture(job, tokens, begin, selections)
        real = tokens.reshape(-1)[: geometry.tokens_in(begin, end)]
        for (writer, _), targets, planes in zip(wanting, rows, chunks, strict=True):
            planes += _encode(writer, begin, end, real, targets)
    for (writer, _), planes in zip(wanting, chunks, strict=True):
        job.meter.committed(writer.commit_unit(unit, planes))


def _encode(
    writer: CacheWriter, first: int, stop: int, tokens: NDArray[np.int64], targets: SparseTargets
) -> list[Planes]:
    """Planes of the chunks that blocks [first, stop) make in one output."""
    geometry, planes = writer.geometry, []
    for begin in range(first, stop, geometry.chunk_blocks):
        low = geometry.tokens_in(first, begin)
        high = geometry.tokens_in(first, min(begin + geometry.chunk_blocks, stop))
        planes.append(writer.encode(begin, tokens[low:high], targets.slice(low, high)))
    return planes


def _capture(
    job: Job, tokens: NDArray[np.int64], first_block: int, selections: Sequence[Selection]
) -> list[SparseTargets]:
    """Rows of consecutive blocks, batch by batch, once for each selection."""
    options = job.options
    batch_blocks = max(1, options.batch_tokens // options.block_length)
    parts: list[list[SparseTargets]] = [[] for _ in selections]
    for start in range(0, tokens.shape[0], batch_blocks):
        batch = tokens[start : start + batch_blocks]
        begin = first_block + start
        num_rows = job.geometry.tokens_in(begin, begin + batch.shape[0])
        captured = capture_blocks(job.teacher, batch, begin, num_rows, selections, options.seed)
        for part, targets in zip(parts, captured, strict=True):
            part.append(targets)
        job.meter.computed_rows(num_rows)
    return [SparseTargets.concatenate(part) for part in parts]
