"""`logitcache dump`: run a teacher once over a corpus and write what it knows. A composition; the parts do the work.

One forward of the teacher can feed several caches: every output has its own selection, plan and commits, and a unit
is computed when at least one output still lacks it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from logitcache.codec import RowCodec
from logitcache.corpus import expand_paths
from logitcache.dump_corpus import Corpus
from logitcache.dump_options import DumpOptions, Output
from logitcache.dump_unit import Job, Meter, pending_units, process_unit
from logitcache.errors import PlanMismatchError
from logitcache.progress import Progress, Silent
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
from logitcache.teachers import TransformersTeacher

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
    corpus = Corpus.prepare(options, files, teacher.tokenizer)
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
    codec = RowCodec.for_selection(selection.method, selection.size, selection.exponent, options.codec)
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
    todo = pending_units(writers)
    job = Job(options, teacher, corpus, writers, Meter(writers[0].geometry, todo, progress))
    progress.stage("running the teacher" if todo else "nothing left to compute")
    started = time.perf_counter()
    for unit in todo:
        process_unit(job, unit)
    seconds = time.perf_counter() - started
    return DumpReport(job.geometry.num_tokens, job.meter.computed, seconds, [writer.finalize() for writer in writers])
