"""`logitcache dump`: run a teacher once over a corpus and write what it knows. A composition; the parts do the work.

One forward of the teacher can feed several caches: every output has its own selection, plan and commits, and a unit
is computed when at least one output still lacks it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import Planes, RowCodec
from logitcache.corpus import expand_paths
from logitcache.dump_corpus import Corpus
from logitcache.dump_options import DumpOptions, Output
from logitcache.errors import PlanMismatchError
from logitcache.progress import Progress, Silent
from logitcache.selection import Selection
from logitcache.store import (
    CacheWriter,
    Geometry,
    Identity,
    Layout,
    Manifest,
    Origin,
    StoredSelection,
    check_folder,
)
from logitcache.targets import SparseTargets
from logitcache.teachers import TransformersTeacher
from logitcache.teachers.capture import capture_blocks

__all__ = ["DumpOptions", "DumpReport", "Output", "Progress", "Silent", "run_dump"]


@dataclass
class DumpReport:
    """What a dump did.

    Args:
        tokens: tokens each cache holds.
        computed_tokens: tokens this run put through the teacher; 0 when there was nothing left to do.
        seconds: wall time of the capture loop, loading and tokenising not counted.
        manifests: of the outputs, in their order.
    """

    tokens: int
    computed_tokens: int
    seconds: float
    manifests: list[Manifest] = field(default_factory=list)


def run_dump(
    options: DumpOptions, progress: Progress | None = None, teacher: TransformersTeacher | None = None
) -> DumpReport:
    """Write, or finish, the caches that `options` asks for.

    `teacher` is one loaded already from `options.teacher`; by default it is loaded here.

    Raises:
        UsageError, CorpusError, ModelError: the arguments, the corpus or the teacher are not usable.
        PlanMismatchError: an output folder holds a cache begun with other arguments.
        CacheError: an output cannot be written; what is committed stays, and the same call resumes.
    """
    progress = progress or Silent()
    for output in options.outputs:
        check_folder(Layout(output.root))
    files = expand_paths(options.corpus)
    if teacher is None:
        progress.stage("loading the teacher")
        teacher = TransformersTeacher.load(
            options.teacher, options.gguf_file, options.dtype, options.device, options.trust_remote_code
        )
    for output in options.outputs:
        output.selection.check_vocabulary(teacher.vocab_size)
    teacher.check_block_length(options.block_length)
    progress.stage("tokenising the corpus")
    corpus = Corpus.prepare(options, files, teacher.tokenizer, teacher.vocab_size)
    source = Path(options.teacher)
    origin = Origin(teacher=str(source.resolve() if source.is_dir() else source), gguf_file=options.gguf_file)
    planned = [(output.root, _identity(options, output, teacher, corpus)) for output in options.outputs]
    try:
        # First those that exist: a mismatch must be found before a new folder is begun.
        for root, identity in planned:
            if Layout(root).plan.exists():
                CacheWriter.open(root, identity, origin, options.wording)
        writers = [CacheWriter.open(root, identity, origin, options.wording) for root, identity in planned]
    except PlanMismatchError:
        corpus.discard_new()
        raise
    lost = [writer.forget_missing_shards() for writer in writers]
    if any(lost):
        # What a finished cache needed no tokens for is to be computed again.
        progress.stage("shards are missing: computing them again")
        return run_dump(options, progress, teacher)
    return _capture_all(options, teacher, corpus, writers, progress)


def _identity(options: DumpOptions, output: Output, teacher: TransformersTeacher, corpus: Corpus) -> Identity:
    selection = output.selection
    codec = RowCodec.for_selection(selection.method, selection.size, selection.exponent, options.codec, corpus.masked)
    return Identity(
        teacher=teacher.identity(),
        tokenizer=corpus.tokenizer,
        vocab_size=teacher.vocab_size,
        corpus=corpus.record,
        selection=StoredSelection(**selection.to_dict()),
        seed=options.seed,
        codec=codec.to_dict(),
        geometry=Geometry.planned(corpus.num_tokens, options.block_length, selection.size, options.unit_tokens),
        container=options.container,
    )


def _capture_all(
    options: DumpOptions,
    teacher: TransformersTeacher,
    corpus: Corpus,
    writers: list[CacheWriter],
    progress: Progress,
) -> DumpReport:
    geometry = writers[0].geometry
    pending = {id(writer): set(writer.pending_units()) for writer in writers}
    todo = sorted(set().union(*pending.values()))
    meter = _Meter(geometry, todo, progress)
    progress.stage("running the teacher" if todo else "nothing left to compute")
    started = time.perf_counter()
    for unit in todo:
        wanting = [
            (writer, output.selection)
            for writer, output in zip(writers, options.outputs, strict=True)
            if unit in pending[id(writer)]
        ]
        _capture_unit(options, teacher, corpus, unit, wanting, meter)
    seconds = time.perf_counter() - started
    return DumpReport(geometry.num_tokens, meter.computed, seconds, [writer.finalize() for writer in writers])


def _capture_unit(
    options: DumpOptions,
    teacher: TransformersTeacher,
    corpus: Corpus,
    unit: int,
    wanting: list[tuple[CacheWriter, Selection]],
    meter: _Meter,
) -> None:
    """Compute one unit and commit it to every output that lacks it."""
    geometry = wanting[0][0].geometry
    first, stop = geometry.unit_range(unit)
    selections = [selection for _, selection in wanting]
    chunks: list[list[Planes]] = [[] for _ in wanting]
    # Every output's chunks divide the longest ones.
    step = max(writer.geometry.chunk_blocks for writer, _ in wanting)
    for begin in range(first, stop, step):
        end = min(begin + step, stop)
        tokens, counted = corpus.read(begin, end), corpus.read_counted(begin, end)
        rows = _capture_blocks(options, teacher, tokens, counted, begin, geometry, selections, meter)
        count = geometry.tokens_in(begin, end)
        real, mask = tokens.reshape(-1)[:count], None if counted is None else counted.reshape(-1)[:count]
        for (writer, _), targets, planes in zip(wanting, rows, chunks, strict=True):
            planes += _encode(writer, begin, end, real, targets, mask)
    for (writer, _), planes in zip(wanting, chunks, strict=True):
        meter.committed(writer.commit_unit(unit, planes))


def _encode(
    writer: CacheWriter,
    first: int,
    stop: int,
    tokens: NDArray[np.int64],
    targets: SparseTargets,
    counted: NDArray[np.bool_] | None,
) -> list[Planes]:
    """Planes of the chunks that blocks [first, stop) make in one output."""
    geometry, planes = writer.geometry, []
    for begin in range(first, stop, geometry.chunk_blocks):
        low = geometry.tokens_in(first, begin)
        high = geometry.tokens_in(first, min(begin + geometry.chunk_blocks, stop))
        mask = None if counted is None else counted[low:high]
        planes.append(writer.encode(begin, tokens[low:high], targets.slice(low, high), mask))
    return planes


def _capture_blocks(
    options: DumpOptions,
    teacher: TransformersTeacher,
    tokens: NDArray[np.int64],
    counted: NDArray[np.bool_] | None,
    first_block: int,
    geometry: Geometry,
    selections: Sequence[Selection],
    meter: _Meter,
) -> list[SparseTargets]:
    batch_blocks = max(1, options.batch_tokens // options.block_length)
    parts: list[list[SparseTargets]] = [[] for _ in selections]
    for start in range(0, tokens.shape[0], batch_blocks):
        batch = tokens[start : start + batch_blocks]
        mask = None if counted is None else counted[start : start + batch_blocks]
        begin = first_block + start
        num_rows = geometry.tokens_in(begin, begin + batch.shape[0])
        captured = capture_blocks(teacher, batch, begin, num_rows, selections, options.seed, mask)
        for part, targets in zip(parts, captured, strict=True):
            part.append(targets)
        meter.computed_rows(num_rows)
    return [SparseTargets.concatenate(part) for part in parts]


class _Meter:
    """Counts tokens and bytes and passes them on."""

    def __init__(self, geometry: Geometry, todo: list[int], progress: Progress) -> None:
        self._total, self._progress = geometry.num_tokens, progress
        self._before = self._total - sum(geometry.tokens_in(*geometry.unit_range(unit)) for unit in todo)
        self.computed = self._bytes = 0

    def computed_rows(self, rows: int) -> None:
        self.computed += rows
        self._tell()

    def committed(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        self._tell()

    def _tell(self) -> None:
        self._progress.advance(self._before + self.computed, self._total, self.computed, self._bytes)
