"""What one worker of a dump works with: teacher, corpus and open outputs, and the count of what is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitcache.codec import RowCodec
from logitcache.corpus import CorpusFile, corpus_files_identity
from logitcache.dump_batches import Batches
from logitcache.dump_corpus import Corpus, Once, alone
from logitcache.dump_options import DumpOptions, Output
from logitcache.errors import PlanMismatchError
from logitcache.progress import Progress
from logitcache.selection import Selection
from logitcache.store import (
    CacheWriter,
    Geometry,
    Identity,
    Layout,
    Manifest,
    Origin,
    Plan,
    StoredSelection,
    load_document,
    open_writer,
    remove_staging,
)
from logitcache.store.writer import refuse_other_plan
from logitcache.teachers import ServerTeacher, Teacher, TensorParallelTeacher, TransformersTeacher


def load_teacher(options: DumpOptions) -> Teacher:
    """The teacher that `options` name; of a tensor-parallel one this process' rank. Raises UsageError or ModelError."""
    if options.served:
        assert options.tokenizer is not None
        return ServerTeacher.connect(options.teacher, options.tokenizer, options.server)
    kind = TensorParallelTeacher if options.tensor_parallel else TransformersTeacher
    return kind.load(
        options.teacher,
        options.gguf_file,
        options.dtype,
        options.device,
        options.trust_remote_code,
        options.tokenizer,
        options.device_map,
        options.tensor_parallel,
        options.compile,
    )


@dataclass
class DumpReport:
    """What a dump did.

    Args:
        tokens: tokens each cache holds.
        computed_tokens: tokens this run put through the teacher; 0 when there was nothing left to do.
        seconds: wall time of the capture loop, loading and tokenising not counted.
        manifests: of the outputs, in their order.
        speaks: whether this process is the one of several that tells the user.
        encode_seconds: that this process encoded, wrote and committed, beside the teacher's forward passes.
        waited_seconds: that the teacher waited for that.
        batch_tokens: of this process' last batches, given or found.
    """

    tokens: int
    computed_tokens: int
    seconds: float
    manifests: list[Manifest] = field(default_factory=list)
    speaks: bool = True
    encode_seconds: float = 0.0
    waited_seconds: float = 0.0
    batch_tokens: int = 0


class Meter:
    """Counts tokens and bytes and passes them on. What other workers finish is counted when a unit begins."""

    def __init__(self, geometry: Geometry, progress: Progress) -> None:
        self._geometry, self._progress = geometry, progress
        self._elsewhere = self.in_unit = 0
        self.computed = self._bytes = 0

    def begin(self, pending: Sequence[int]) -> None:
        """A unit begins, or nothing is left; `pending` are the units that some output lacks."""
        lacking = sum(self._geometry.tokens_in(*self._geometry.unit_range(unit)) for unit in pending)
        self._elsewhere, self.in_unit = self._geometry.num_tokens - lacking, 0

    def computed_rows(self, rows: int) -> None:
        """So many tokens went through the teacher."""
        self.computed += rows
        self.in_unit += rows
        self._tell(self.computed)

    def committed_later(self) -> Callable[[int], None]:
        """To be called with the bytes that were committed of what is computed by now."""
        computed = self.computed

        def committed(num_bytes: int) -> None:
            self._bytes += num_bytes
            if num_bytes:
                self._tell(computed)

        return committed

    def _tell(self, computed: int) -> None:
        total = self._geometry.num_tokens
        self._progress.advance(min(self._elsewhere + self.in_unit, total), total, computed, self._bytes)


@dataclass
class Job:
    """What a worker needs for every unit.

    Args:
        options: of the dump.
        teacher: loaded.
        corpus: its token blocks.
        writers: of the outputs, in their order.
        progress: told of what is done, through `meter`.
    """

    options: DumpOptions
    teacher: Teacher
    corpus: Corpus
    writers: list[CacheWriter]
    progress: Progress

    def __post_init__(self) -> None:
        self.meter = Meter(self.geometry, self.progress)
        longest = max(writer.geometry.chunk_blocks for writer in self.writers)
        self.batches = Batches.of(self.options, self.teacher, longest, self.progress)
        # No batch goes beyond a chunk, and a teacher that is told their size is to be told the real one.
        self.batches.blocks = min(self.batches.blocks, longest)
        self.said_left_out = False

    @classmethod
    def prepare(
        cls,
        options: DumpOptions,
        files: Sequence[CorpusFile],
        teacher: Teacher,
        progress: Progress,
        once: Once = alone,
    ) -> Job:
        """Tokenise the corpus, unless that was done, and open the outputs.

        Raises:
            CorpusError: the corpus is not usable.
            PlanMismatchError: an output folder holds a cache begun with other arguments.
            CacheError: an output cannot be written.
        """
        corpus = Corpus.prepare(options, files, teacher.tokenizer, teacher.vocab_size, once, progress)
        origin = origin_of(options)
        planned = [(output, identity_of(options, output, teacher, corpus)) for output in options.outputs]

        def opened(output: Output, identity: Identity) -> CacheWriter:
            return open_writer(output.root, identity, origin, options.wording_of(output), output.url)

        try:
            # First those that exist: a mismatch must be found before a new folder is begun.
            for output, identity in planned:
                if Layout(output.root).plan.exists():
                    opened(output, identity)
            writers = [opened(output, identity) for output, identity in planned]
        except PlanMismatchError:
            corpus.discard_new()
            _remove_staging(options)
            raise
        return cls(options, teacher, corpus, writers, progress)

    @property
    def geometry(self) -> Geometry:
        """Tokens, blocks and units, which all outputs share."""
        return self.writers[0].geometry

    def lacking(self, unit: int) -> list[tuple[CacheWriter, Selection]]:
        """The outputs that `unit` is not committed to."""
        outputs = zip(self.writers, self.options.outputs, strict=True)
        return [(writer, output.selection) for writer, output in outputs if not writer.is_committed(unit)]

    def pending(self) -> list[int]:
        """Units that at least one output lacks, ascending."""
        return sorted(set().union(*(writer.pending_units() for writer in self.writers)))

    def finish(self, seconds: float, encoding: tuple[float, float]) -> DumpReport:
        """Write the manifests, unless another worker did; times as of `DumpReport`.

        Raises:
            CacheError: a unit is missing.
        """
        manifests = [writer.finalize() for writer in self.writers]
        counts = self.geometry.num_tokens, self.meter.computed
        return DumpReport(*counts, seconds, manifests, True, *encoding, self.batches.tokens)


def refuse_other_arguments(options: DumpOptions, files: Sequence[CorpusFile]) -> None:
    """Compare a dump that was begun with what the arguments alone settle, before a teacher is loaded for nothing.

    Of the corpus' `files` names and sizes are looked at, not yet what is in them.

    Raises PlanMismatchError, as `Job.prepare` does of all that differs.
    """
    for output in options.outputs:
        path = Layout(output.root).plan
        if path.exists():
            plan = load_document(path, Plan)
            given = _with_arguments(plan.identity, options, output, files)
            try:
                refuse_other_plan(output.location, plan, given, options.wording_of(output))
            except PlanMismatchError:
                _remove_staging(options)
                raise


def _remove_staging(options: DumpOptions) -> None:
    for output in options.outputs:
        if output.url is not None:
            remove_staging(output.root, output.url)


def _with_arguments(stored: Identity, options: DumpOptions, output: Output, files: Sequence[CorpusFile]) -> Identity:
    """What a cache's identity would be if these arguments had settled it, where they alone do."""
    settled = _settled(options, output, stored.geometry.num_tokens, bool(stored.codec.get("masked")))
    geometry = {"block_length": options.block_length}
    # Else, and always of chunks, their sizes follow from more than the arguments.
    if options.unit_tokens:
        geometry["unit_blocks"] = settled["geometry"].unit_blocks
    teacher = {name: value for name, value in stored.teacher.items() if name not in ("nonfinite", "compiled")}
    teacher |= {**_left_out(options), **({"compiled": True} if options.compile else {})}
    corpus = _corpus_with_arguments(stored.corpus, options, files)
    return stored.model_copy(
        update={
            **settled,
            "geometry": stored.geometry.model_copy(update=geometry),
            "teacher": teacher,
            "corpus": corpus,
        }
    )


def _corpus_with_arguments(stored: dict[str, Any], options: DumpOptions, files: Sequence[CorpusFile]) -> dict[str, Any]:
    """What a plan says of the corpus, with the fields that are read now; with other files, if names or sizes tell."""
    if "files" not in stored:  # of a cache that was merged
        return stored
    known = {name: value for name, value in stored.items() if not name.endswith("_field")}
    known |= {**options.fields.to_dict(), "max_tokens": options.max_tokens}
    there = [(file.name, file.path.stat().st_size) for file in files]
    if there != [(file["name"], file["bytes"]) for file in stored["files"]]:
        known["files"] = corpus_files_identity(files)
    return known


def _settled(options: DumpOptions, output: Output, num_tokens: int, masked: bool) -> dict[str, Any]:
    """Fields of an identity that the arguments settle, for a corpus of so many tokens, masked or not."""
    selection = output.selection
    codec = RowCodec.for_selection(selection.method, selection.size, selection.exponent, options.codec, masked)
    return {
        "selection": StoredSelection(**selection.to_dict()),
        "seed": options.seed,
        "codec": codec.to_dict(),
        "geometry": Geometry.planned(num_tokens, options.block_length, selection.size, options.unit_tokens),
        "container": options.container,
    }


def _left_out(options: DumpOptions) -> dict[str, str]:
    """What a plan says of rows that are not finite."""
    return {} if options.nonfinite == "fail" else {"nonfinite": options.nonfinite}


def origin_of(options: DumpOptions) -> Origin:
    """Where the tokenizer of a cache's ids is: the teacher's own, or the one that was named."""
    source = Path(options.tokenizer or options.teacher)
    return Origin(
        teacher=str(source.resolve() if source.is_dir() else source),
        gguf_file=None if options.tokenizer else options.gguf_file,
    )


def identity_of(options: DumpOptions, output: Output, teacher: Teacher, corpus: Corpus) -> Identity:
    """What determines the cache that `output` is to become."""
    left_out = _left_out(options)
    masked = corpus.masked or bool(left_out)
    return Identity(
        teacher={**teacher.identity(), **left_out},
        tokenizer=corpus.tokenizer,
        vocab_size=teacher.vocab_size,
        corpus=corpus.record,
        **_settled(options, output, corpus.num_tokens, masked),
    )
