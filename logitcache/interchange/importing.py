"""DistillKit's captures -> a cache. Resumable and checked like a dump: it goes through CacheWriter, unit by unit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import LayoutName, Planes, RowCodec
from logitcache.corpus import corpus_files_identity
from logitcache.errors import InterchangeError, UsageError
from logitcache.interchange.decoding import decode_sequence
from logitcache.interchange.distillkit import DistillKitLayout
from logitcache.interchange.layouts import CONFIG_NAME, choose_layout
from logitcache.interchange.sequences import SequenceRow, Sequences, parquet_files, scan
from logitcache.progress import Progress, Silent
from logitcache.store import (
    CacheWriter,
    ContainerKind,
    Geometry,
    Identity,
    Layout,
    Manifest,
    Origin,
    StoredSelection,
    Wording,
    check_folder,
)
from logitcache.store.files import digest
from logitcache.targets import SparseTargets

WORDING = Wording(
    options={
        "codec.layout": "--codec",
        "container": "--container",
        "corpus.files": "PATH",
        "corpus.packing.block_length": "--block-length",
        "teacher.layout": "--layout",
        "tokenizer": "--tokenizer",
        "vocab_size": "--vocab-size",
    },
    follows=("corpus", "geometry", "selection", "teacher"),
)


@dataclass(frozen=True)
class ImportOptions:
    """Everything `logitcache import --from distillkit` can be told.

    Args:
        paths: Parquet files, or folders of them.
        out: the cache to write, or to finish.
        tokenizer: folder or hub id of the tokenizer that made `input_ids`.
        layout: a YAML file, "recommended" or "budget"; by default compression_config.yaml beside the files.
        vocab_size: rows of the teacher's LM head; by default the layout's d.
        block_length: keep so many positions of each sequence and leave shorter ones out.
        codec: "small" (fewest bytes) or "fast" (fastest to read).
        container: kind of the cache's files.
    """

    paths: tuple[str, ...]
    out: Path
    tokenizer: str
    layout: str | None = None
    vocab_size: int | None = None
    block_length: int | None = None
    codec: LayoutName = "small"
    container: ContainerKind = "zarr"

    def __post_init__(self) -> None:
        if self.block_length is not None and self.block_length < 2:
            raise UsageError(f"block length is {self.block_length}; it must be at least 2")


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Args:
        manifest: of the finished cache.
        left_out: sequences shorter than the block length asked for.
        rescaled: positions whose stored probabilities summed to more than 1, in the whole cache.
    """

    manifest: Manifest
    left_out: int
    rescaled: int


def import_distillkit(options: ImportOptions, progress: Progress | None = None) -> ImportReport:
    """Write, or finish, a `top-k` cache from files in the schema of DistillKit's captures.

    Entropy is unknown (NaN); label_logprob is known where the next token is among the k ids, NaN elsewhere.

    Raises:
        UsageError, CorpusError, ModelError: the arguments, the paths or the tokenizer are not usable.
        InterchangeError: the files are damaged, foreign, or do not fit their layout; the message names the sequence.
        PlanMismatchError, CacheError: as CacheWriter.
    """
    progress = progress or Silent()
    check_folder(Layout(options.out))
    files, first = parquet_files(options.paths), Path(options.paths[0])
    beside = (first if first.is_dir() else first.parent) / CONFIG_NAME
    layout = choose_layout(options.layout or str(beside), options.vocab_size)
    vocab_size = layout.d if options.vocab_size is None else options.vocab_size
    if vocab_size < layout.k:
        raise UsageError(
            f"vocabulary {vocab_size} is smaller than the {layout.k} ids of a position; give the right one"
        )
    tokenizer, origin = _tokenizer(options.tokenizer)
    progress.stage("reading the tokens")
    found = scan(files, options.block_length)
    if found.largest[0] >= vocab_size:
        raise InterchangeError(
            f"{found.largest[1]} has the token {found.largest[0]}, but the vocabulary has {vocab_size} ids; give the "
            "teacher's with --vocab-size"
        )
    if found.length < 2:
        raise InterchangeError("the first sequence has 1 position, and a cache's blocks need 2; give longer sequences")
    identity = _identity(options, layout, vocab_size, tokenizer, found)
    writer = CacheWriter.open(options.out, identity, origin, WORDING)
    progress.stage("converting")
    _write_units(writer, layout, found, progress)
    manifest = writer.finalize()
    return ImportReport(manifest, found.left_out, manifest.counters.get("rescaled_rows", 0))


def _write_units(writer: CacheWriter, layout: DistillKitLayout, found: Sequences, progress: Progress) -> None:
    """Convert and commit every unit that is not committed yet."""
    geometry = writer.geometry
    todo = writer.pending_units()
    done = geometry.num_tokens - sum(geometry.tokens_in(*geometry.unit_range(unit)) for unit in todo)
    computed = num_bytes = 0
    progress.advance(done, geometry.num_tokens, 0, 0)
    rows: Iterator[SequenceRow] = iter(())
    position = -1
    for unit in todo:
        first, stop = geometry.unit_range(unit)
        if position != first:
            rows = found.read(first)
        position = stop
        chunks: list[Planes] = []
        scaled = 0
        for begin in range(first, stop, geometry.chunk_blocks):
            count = min(geometry.chunk_blocks, stop - begin)
            tokens, targets, over = _decode_chunk(itertools.islice(rows, count), layout, writer.identity.vocab_size)
            chunks.append(writer.encode(begin, tokens, targets))
            scaled, computed = scaled + over, computed + tokens.size
            progress.advance(done + computed, geometry.num_tokens, computed, num_bytes)
        num_bytes += writer.commit_unit(unit, chunks, {"rescaled_rows": scaled})
        progress.advance(done + computed, geometry.num_tokens, computed, num_bytes)


def _decode_chunk(
    rows: Iterator[SequenceRow], layout: DistillKitLayout, vocab_size: int
) -> tuple[NDArray[np.int64], SparseTargets, int]:
    tokens, parts, scaled = [], [], 0
    for row in rows:
        targets, over = decode_sequence(row, layout, vocab_size)
        tokens.append(row.tokens)
        parts.append(targets)
        scaled += over
    return np.concatenate(tokens), SparseTargets.concatenate(parts), scaled


def _tokenizer(source: str) -> tuple[dict[str, Any], Origin]:
    from logitcache import models

    identity = models.tokenizer_identity(models.load_tokenizer(source))
    folder = Path(source)
    return identity, Origin(teacher=str(folder.resolve()) if folder.is_dir() else source)


def _identity(
    options: ImportOptions, layout: DistillKitLayout, vocab_size: int, tokenizer: dict[str, Any], found: Sequences
) -> Identity:
    files = corpus_files_identity(found.files)
    fields = layout.model_dump(mode="json")
    return Identity(
        teacher={
            "name": "imported from distillkit",
            "imported_from": "distillkit",
            "files": [{"name": file["name"], "sha256": file["sha256"]} for file in files],
            "sha256": digest([files, fields]),
            "layout": fields,
        },
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        corpus={
            "files": files,
            "packing": {"block_length": found.length, "bos": "unknown", "eos": "unknown"},
            "num_tokens": found.num_tokens,
            "documents": found.num_blocks,
            "left_out": found.left_out,
            "sha256": found.sha256,
            "document_boundaries": "unknown",
        },
        selection=StoredSelection(method="top-k", size=layout.k),
        seed=0,
        codec=RowCodec.for_selection("top-k", layout.k, None, options.codec).to_dict(),
        geometry=Geometry.planned(found.num_tokens, found.length, layout.k),
        container=options.container,
    )
