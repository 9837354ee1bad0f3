"""What each selection, codec and container costs in bytes and time, and what it does to the gradient.

One teacher pass writes a cache of every selection; the other codecs and containers are made of those. Errors are
measured on positions whose full distribution is at hand. Times are those of one core.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from logitcache.algebra import Derivation, derive_cache
from logitcache.bench.peers import Peer, peers_for
from logitcache.bench.yardstick import GradientError, Yardstick, mean_divergence
from logitcache.codec import LayoutName
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.errors import UsageError
from logitcache.progress import Progress, Silent
from logitcache.selection import Selection, chunk_uniforms
from logitcache.store import Cache, ContainerKind, convert, open_cache
from logitcache.store.container import open_container, write_container
from logitcache.store.layout import SUFFIXES
from logitcache.targets import SparseTargets
from logitcache.teachers import TransformersTeacher, is_url

SELECTIONS = (
    "sample:25", "sample:50", "varopt:12", "varopt:20",
    "top-k:12", "top-k:50", "top-k:64", "top-k:128", "top-p:0.95:100",
)  # fmt: skip
VARIANTS: tuple[tuple[LayoutName, ContainerKind], ...] = (
    ("small", "zarr"), ("fast", "zarr"), ("small", "arrow"), ("fast", "arrow"),
)  # fmt: skip
SIDE_PLANES = ("tokens", "label_logprob", "entropy", "tail")
TIMED_ENTRIES = 1 << 20
REPEATS = 9


@dataclass(frozen=True)
class StorageOptions:
    """What to measure.

    Args:
        teacher, corpus, gguf_file, dtype, device: as in `DumpOptions`.
        max_tokens: size of the caches.
        block_length: tokens in a block.
        selections: what to store.
        positions: positions whose gradient is measured, a multiple of `block_length`.
        folder: where the caches are kept and a later run finds them; None for a temporary folder.
    """

    teacher: str
    corpus: tuple[str, ...]
    gguf_file: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_tokens: int = 204_800
    block_length: int = 512
    selections: tuple[str, ...] = SELECTIONS
    positions: int = 1024
    folder: Path | None = None

    def __post_init__(self) -> None:
        if is_url(self.teacher):
            raise UsageError(
                "selections are measured against whole distributions, which a server does not tell; give a folder or "
                "hub id as --teacher"
            )
        if self.positions < self.block_length or self.positions % self.block_length:
            raise UsageError(
                f"{self.positions} positions are no multiple of the block length, {self.block_length}; "
                f"choose another --positions or --block-length"
            )


@dataclass(frozen=True)
class Measurement:
    """One line of the table.

    Args:
        selection: as it is spelled.
        layout: codec and container, or a peer's name.
        ids_per_token: stored ids.
        entry_bytes: bytes a token of ids, weights, lengths and the tables they need.
        side_bytes: bytes a token of input tokens, label_logprob, entropy and tail; None for peers, which have none.
        total_bytes: bytes of all files over tokens.
        encode_rate, decode_rate: million tokens a second on one core, container included.
        divergence: mean KL in nats of decoded rows from the encoded ones.
        gradient: of decoded rows, against full distillation.
    """

    selection: str
    layout: str
    ids_per_token: float
    entry_bytes: float
    side_bytes: float | None
    total_bytes: float
    encode_rate: float
    decode_rate: float
    divergence: float
    gradient: GradientError


def measure_storage(options: StorageOptions, progress: Progress | None = None) -> list[Measurement]:
    """Dump, re-encode and measure everything.

    Raises:
        UsageError, CorpusError, ModelError, CacheError: as `run_dump`.
    """
    progress = progress or Silent()
    if options.folder is not None:
        return _measure_in(options.folder, options, progress)
    with tempfile.TemporaryDirectory() as folder:
        return _measure_in(Path(folder), options, progress)


def _measure_in(folder: Path, options: StorageOptions, progress: Progress) -> list[Measurement]:
    selections = [Selection.parse(spec) for spec in options.selections]
    caches = _dump(folder, selections, options, progress)
    progress.stage("computing full distributions and their gradient")
    teacher = TransformersTeacher.load(options.teacher, options.gguf_file, "float32", options.device)
    blocks = caches[0].read_blocks(0, options.positions // options.block_length)
    yardstick = Yardstick(teacher, blocks.tokens)
    lines = []
    for selection, cache in zip(selections, caches, strict=True):
        progress.stage(f"measuring {selection}")
        rows = yardstick.select(selection)
        for layout, container in VARIANTS:
            lines.append(_measure_ours(_variant(cache, layout, container), selection, rows, yardstick))
        sample = _timed_rows(cache)
        for peer in peers_for(selection.method, selection.size, cache.vocab_size):
            lines.append(_measure_peer(peer, selection, sample, rows, yardstick))
    return lines


def _dump(folder: Path, selections: list[Selection], options: StorageOptions, progress: Progress) -> list[Cache]:
    """One cache of each selection, from one pass of the teacher; finished ones are found again."""
    outputs = tuple(
        Output(selection, folder / str(selection).replace(":", "-") / "small-zarr") for selection in selections
    )
    for output in outputs:
        output.root.parent.mkdir(parents=True, exist_ok=True)
    run_dump(
        DumpOptions(
            teacher=options.teacher,
            corpus=options.corpus,
            outputs=outputs,
            gguf_file=options.gguf_file,
            dtype=options.dtype,
            device=options.device,
            block_length=options.block_length,
            max_tokens=options.max_tokens,
        ),
        progress,
    )
    return [open_cache(output.root) for output in outputs]


def _variant(cache: Cache, layout: LayoutName, container: ContainerKind) -> Cache:
    """The same rows in another codec and container, beside the cache."""
    if cache.codec.layout != layout:
        root = cache.root.parent / f"{layout}-{cache.manifest.identity.container}"
        derive_cache(cache.root, root, Derivation(codec=layout))
        cache = open_cache(root)
    if cache.manifest.identity.container != container:
        root = cache.root.parent / f"{layout}-{container}"
        convert(cache.root, root, container)
        cache = open_cache(root)
    return cache


def _measure_ours(cache: Cache, selection: Selection, rows: SparseTargets, yardstick: Yardstick) -> Measurement:
    identity = cache.manifest.identity
    stored = cache.stored_bytes()
    tables = cache.codebook_bytes
    side = sum(stored.get(name, 0) for name in SIDE_PLANES)
    entries = sum(shard.num_entries for shard in cache.manifest.shards)
    encode, decode = _rates(cache)
    decoded = cache.codec.targets(cache.codec.code(rows, chunk_uniforms(0, 0)))
    return Measurement(
        selection=str(selection),
        layout=f"{cache.codec.layout}, {identity.container}",
        ids_per_token=entries / cache.num_tokens,
        entry_bytes=(sum(stored.values()) - side + tables) / cache.num_tokens,
        side_bytes=side / cache.num_tokens,
        total_bytes=cache.num_bytes / cache.num_tokens,
        encode_rate=encode,
        decode_rate=decode,
        divergence=mean_divergence(rows, decoded),
        gradient=yardstick.gradient_error(decoded),
    )


def _timed_rows(cache: Cache) -> SparseTargets:
    """Rows of the first chunk, about a million entries at most."""
    rows = cache.read_chunk(cache.chunks[0]).targets
    return rows.slice(0, int(np.searchsorted(rows.offsets, TIMED_ENTRIES, side="right")) - 1)


def _rates(cache: Cache) -> tuple[float, float]:
    """Million tokens a second of encoding into a shard of one chunk, and of decoding a chunk of an open one."""
    tokens, coded = cache.read_coded(cache.chunks[0])
    codec, codebook, kind = cache.codec, cache.codebook(), cache.manifest.identity.container
    targets = codec.targets(coded)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"chunk{SUFFIXES[kind]}"

        def encode() -> None:
            planes = codec.encode(tokens, targets, codebook, chunk_uniforms(0, 0))
            write_container(kind, path, [{"tokens": codebook.ranks.encode(tokens), **planes}], {})

        encode_seconds = _seconds(encode)
        container = open_container(path)

        def decode() -> SparseTargets:
            planes = container.read_chunk(0)
            return codec.decode(codebook.ranks.decode(planes.pop("tokens")), planes, codebook)

        decode_seconds = _seconds(decode)
        container.close()
    return tokens.size / encode_seconds / 1e6, tokens.size / decode_seconds / 1e6


def _measure_peer(
    peer: Peer, selection: Selection, sample: SparseTargets, rows: SparseTargets, yardstick: Yardstick
) -> Measurement:
    stored = peer.encode(sample)
    num_bytes = sum(len(part) for part in stored) / len(sample)
    decoded = peer.decode(peer.encode(rows), rows)
    return Measurement(
        selection=str(selection),
        layout=peer.name,
        ids_per_token=sample.ids.size / len(sample),
        entry_bytes=num_bytes,
        side_bytes=None,
        total_bytes=num_bytes,
        encode_rate=len(sample) / _seconds(lambda: peer.encode(sample)) / 1e6,
        decode_rate=len(sample) / _seconds(lambda: peer.decode(stored, sample)) / 1e6,
        divergence=mean_divergence(rows, decoded),
        gradient=yardstick.gradient_error(decoded),
    )


def _seconds(job: Callable[[], object]) -> float:
    """The least processor time of a few runs: other programs' share of the machine does not count."""
    return min(_timed(job) for _ in range(REPEATS))


def _timed(job: Callable[[], object]) -> float:
    # Of this thread: torch's own may still spin from the work before.
    started = time.thread_time()
    job()
    return time.thread_time() - started
