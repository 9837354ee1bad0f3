"""`logitcache dump`: run a teacher once over a corpus and write what it knows. A composition; the parts do the work.

One forward of the teacher can feed several caches: every output has its own selection, plan and commits, and a unit
is computed when at least one output still lacks it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache import models
from logitcache.codec import Planes, RowCodec
from logitcache.corpus import (
    CorpusFile,
    PackingPolicy,
    corpus_files_identity,
    expand_paths,
    iter_documents,
    pack_to_file,
    resolve_policy,
)
from logitcache.dump_options import DumpOptions, Output
from logitcache.errors import CorpusError, PlanMismatchError
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
    TokenFile,
    check_folder,
    load_document,
)
from logitcache.targets import SparseTargets
from logitcache.teachers import ServerTeacher, Teacher, TransformersTeacher

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


def run_dump(options: DumpOptions, progress: Progress | None = None, teacher: Teacher | None = None) -> DumpReport:
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
        teacher = load_teacher(options)
    for output in options.outputs:
        output.selection.check_vocabulary(teacher.vocab_size)
    teacher.check_selections([output.selection for output in options.outputs])
    teacher.check_block_length(options.block_length)
    progress.stage("tokenising the corpus")
    corpus = Corpus.prepare(options, files, teacher.tokenizer)
    source = Path(options.tokenizer or options.teacher)
    origin = Origin(
        teacher=str(source.resolve() if source.is_dir() else source),
        gguf_file=None if options.tokenizer else options.gguf_file,
    )
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


def load_teacher(options: DumpOptions) -> Teacher:
    """The teacher that `options` name. Raises UsageError or ModelError."""
    if options.served:
        assert options.tokenizer is not None
        return ServerTeacher.connect(options.teacher, options.tokenizer, options.server)
    return TransformersTeacher.load(
        options.teacher,
        options.gguf_file,
        options.dtype,
        options.device,
        options.trust_remote_code,
        options.tokenizer,
    )


class Corpus:
    """The token blocks of a dump, kept in a file in the first output's scratch folder until the dump is complete.

    Resuming reuses that file; a finished dump run again needs no tokens and makes none.

    Attributes:
        record: what the plan says of the corpus.
        tokenizer: identity of the tokenizer that makes the tokens.
    """

    def __init__(
        self, record: dict[str, Any], tokenizer: dict[str, Any], stored: TokenFile, block_length: int, new: bool
    ) -> None:
        self.record, self.tokenizer = record, tokenizer
        self._stored, self._block_length, self._new = stored, block_length, new

    @classmethod
    def prepare(cls, options: DumpOptions, files: Sequence[CorpusFile], tokenizer: Any) -> Corpus:
        """Find the tokens that an earlier run left, or tokenise. Raises CorpusError."""
        policy = resolve_policy(tokenizer, options.block_length, options.bos, options.eos)
        inputs = {
            "files": corpus_files_identity(files),
            "packing": policy.to_dict(),
            "text_field": options.text_field,
            "max_tokens": options.max_tokens,
        }
        identity = models.tokenizer_identity(tokenizer)
        key = {**inputs, "tokenizer": identity["sha256"]}
        layout = Layout(options.outputs[0].root)
        stored = TokenFile(layout.work)
        found = _facts_of_finished(options, inputs) or stored.find(key)
        facts = found or cls._tokenise(options, files, tokenizer, policy, stored, key)
        return cls({**inputs, **facts}, identity, stored, options.block_length, new=found is None)

    @staticmethod
    def _tokenise(
        options: DumpOptions,
        files: Sequence[CorpusFile],
        tokenizer: Any,
        policy: PackingPolicy,
        stored: TokenFile,
        key: dict[str, Any],
    ) -> dict[str, Any]:
        stored.prepare()
        documents = iter_documents(files, options.text_field)
        try:
            blocks = pack_to_file(tokenizer, documents, policy, stored.path, options.max_tokens)
        except CorpusError:
            stored.discard()
            raise
        facts = {
            "num_tokens": blocks.num_tokens,
            "documents": blocks.documents,
            "empty_documents": blocks.empty_documents,
            "sha256": blocks.sha256,
            # Attention runs over the whole block, across the documents in it.
            "document_boundaries": "attended",
        }
        stored.record(key, facts)
        return facts

    def discard_new(self) -> None:
        """Remove the token file if this run made it: the cache there has no use for it."""
        if self._new:
            self._stored.discard()

    @property
    def num_tokens(self) -> int:
        return int(self.record["num_tokens"])

    def read(self, first: int, stop: int) -> NDArray[np.int64]:
        """Blocks [first, stop) as int64 [B, L], padded at the corpus' end."""
        return self._stored.read(first * self._block_length, stop * self._block_length).reshape(-1, self._block_length)


def _facts_of_finished(options: DumpOptions, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """What tokenising gave, from the manifests, when every output is finished and was made from the same inputs."""
    facts = None
    for output in options.outputs:
        layout = Layout(output.root)
        if not layout.manifest.exists():
            return None
        corpus = load_document(layout.manifest, Manifest).identity.corpus
        if any(corpus.get(name) != value for name, value in inputs.items()):
            return None
        facts = {name: value for name, value in corpus.items() if name not in inputs}
    return facts


def _identity(options: DumpOptions, output: Output, teacher: Teacher, corpus: Corpus) -> Identity:
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
    teacher: Teacher,
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
    teacher: Teacher,
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
        tokens = corpus.read(begin, end)
        rows = _capture_blocks(options, teacher, tokens, begin, geometry, selections, meter)
        real = tokens.reshape(-1)[: geometry.tokens_in(begin, end)]
        for (writer, _), targets, planes in zip(wanting, rows, chunks, strict=True):
            planes += _encode(writer, begin, end, real, targets)
    for (writer, _), planes in zip(wanting, chunks, strict=True):
        meter.committed(writer.commit_unit(unit, planes))


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


def _capture_blocks(
    options: DumpOptions,
    teacher: Teacher,
    tokens: NDArray[np.int64],
    first_block: int,
    geometry: Geometry,
    selections: Sequence[Selection],
    meter: _Meter,
) -> list[SparseTargets]:
    batch_blocks = max(teacher.blocks_at_once, options.batch_tokens // options.block_length)
    parts: list[list[SparseTargets]] = [[] for _ in selections]
    for start in range(0, tokens.shape[0], batch_blocks):
        batch = tokens[start : start + batch_blocks]
        begin = first_block + start
        num_rows = geometry.tokens_in(begin, begin + batch.shape[0])
        captured = teacher.rows(batch, begin, num_rows, selections, options.seed)
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
