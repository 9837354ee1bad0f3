"""The read side: open a cache, read blocks of it. Trusts the manifest and what it hashes, never a folder listing."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import FRESH, Codebook, CodedRows, Memory, RowCodec
from logitcache.errors import CacheError, DamagedCacheError, FormatVersionError, TargetsError
from logitcache.selection import Selection
from logitcache.store.access import CacheFiles, LocalFiles
from logitcache.store.blocks import Blocks, ChunkRef, cut, join, to_blocks
from logitcache.store.commits import assemble_manifest
from logitcache.store.container import Plane
from logitcache.store.layout import Layout
from logitcache.store.location import S3Location, parse_location
from logitcache.store.open_shards import OpenShards
from logitcache.store.schema import Manifest, Plan, load_document
from logitcache.store.writer import parse_codebook, read_codebook
from logitcache.targets import SparseTargets


class Cache:
    """A cache opened for reading. Made by `open_cache`.

    Reading verifies: a shard's SHA-256 on first use, each chunk's crc32c, and that the content is what the
    manifest says. May be used from several threads and after a fork.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        kept_chunks: int = 4,
        files: CacheFiles | None = None,
        num_blocks: int | None = None,
    ) -> None:
        self.root, self.manifest = root, manifest
        self._num_blocks = manifest.identity.geometry.num_blocks if num_blocks is None else num_blocks
        self.files = files or LocalFiles(Layout(root, manifest.identity.container))
        self.codec = RowCodec.from_dict(manifest.identity.codec)
        selection = manifest.identity.selection
        if not self.codec.stores(selection.method, selection.size, selection.exponent):
            raise FormatVersionError(
                f"{self.location} stores selection {selection.method}:{selection.size} with codec "
                f"{manifest.identity.codec}, which is unknown to this version; upgrade logitcache"
            )
        self._kept_chunks = kept_chunks
        self._codebook: Codebook | None = None
        self._shards = OpenShards(manifest, self.files)
        self._decoded: OrderedDict[ChunkRef, Blocks] = OrderedDict()
        self.chunks = self._list_chunks()
        self._chunk_starts = [chunk.first_block for chunk in self.chunks]

    @property
    def location(self) -> str:
        """The path or URL it was opened from; `root` is a folder even for a remote one, of this machine's copies."""
        return self.files.location

    @property
    def num_tokens(self) -> int:
        """Real tokens stored."""
        return sum(shard.num_tokens for shard in self.manifest.shards)

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole cache, or of a snapshot; the whole one's last and `short_blocks` hold fewer tokens."""
        return self._num_blocks

    @property
    def num_units(self) -> int:
        """Units that are there."""
        return len(self.manifest.shards)

    @property
    def is_whole(self) -> bool:
        """Whether every block can be read: not of a cache opened with `partial=True` in which units are missing."""
        return sum(shard.num_blocks for shard in self.manifest.shards) == self.num_blocks

    @property
    def block_length(self) -> int:
        return self.manifest.identity.geometry.block_length

    @property
    def vocab_size(self) -> int:
        """Rows of the teacher's LM head; every stored id is below it."""
        return self.manifest.identity.vocab_size

    @property
    def tokenizer(self) -> str:
        """Hex SHA-256 of the tokenizer that made its tokens."""
        return str(self.manifest.identity.tokenizer.get("sha256"))

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that determines the cache's meaning."""
        return self.manifest.fingerprint

    @property
    def selection(self) -> Selection:
        """What was kept of each row."""
        return self.manifest.identity.selection.spec

    @property
    def unbiased(self) -> bool:
        """Whether the stored weights are unbiased estimates: of `sample` and `varopt` caches."""
        return self.manifest.identity.selection.unbiased

    @property
    def has_exact_head(self) -> bool:
        """Whether rows say which weights are exact, as tail='bucket' needs: of all but `sample` caches."""
        return self.manifest.identity.selection.has_exact_head

    @property
    def keeps_ids(self) -> bool:
        """Whether rows have entries; those of `label` caches are columns only."""
        return self.codec.keeps_ids

    @property
    def masked(self) -> bool:
        """Whether only some positions count, as of a corpus of prompts and completions."""
        return self.codec.masked

    @property
    def num_counted(self) -> int:
        """Tokens whose next token is one to learn; of a cache without a mask all of them.

        The manifest of a masked snapshot does not know, so that its masks are read. Raises DamagedCacheError then.
        """
        if not self.masked:
            return self.num_tokens
        if "counted" in self.manifest.counters:
            return self.manifest.counters["counted"]
        return sum(int(mask.sum()) for ref in self.chunks if (mask := self.read_counted(ref)) is not None)

    @property
    def num_nonfinite(self) -> int | None:
        """Rows that were left out because the teacher's logits were NaN or infinite; None where that was an error, and,
        with `identity.leaves_out_nonfinite`, where it is not known: of some caches made of parts of others."""
        return self.manifest.counters.get("nonfinite")

    @property
    def num_bytes(self) -> int:
        """Bytes of all files that belong to the cache and are there; of remote shards the manifest's sizes."""
        return self.files.num_bytes(self.manifest.shards)

    @property
    def missing_shards(self) -> list[str]:
        """Names of shards whose files are not there; nothing is read. Of a remote cache nobody looks: always empty."""
        return self.files.missing_shards(self.manifest.shards)

    @property
    def codebook_bytes(self) -> int:
        """Bytes of the file of the codec's tables."""
        return self.files.codebook_bytes()

    def stored_bytes(self, shards: Iterable[int] | None = None) -> dict[str, int]:
        """Bytes that the compressed chunks of each plane take in these shards (numbers), by default in all.

        Raises DamagedCacheError.
        """
        total: dict[str, int] = {}
        for number in range(len(self.manifest.shards)) if shards is None else shards:
            container = self._shards.open(number)
            for name in container.sizes:
                total[name] = total.get(name, 0) + container.stored_bytes(name)
        return total

    def __repr__(self) -> str:
        return f"Cache({self.location!r}, {self.num_tokens:,} tokens in {self.num_blocks:,} blocks)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": OrderedDict()}

    def snapshot(self, units: int | None = None) -> Cache:
        """The first units as a cache of its own, which stays the same while its dump goes on and after.

        Committed units never change, so `snapshot(n)` has the same fingerprint whenever it is taken.

        Args:
            units: how many; by default all before the first that is missing.

        Raises:
            CacheError: there are not so many yet, or none.
        """
        there = self._first_units()
        if not 0 < (there if units is None else units) <= there:
            wanted = "none of its units" if units is None else f"not its first {units} units but {there}"
            raise CacheError(f"{self.location} has {wanted} yet; wait until its dump has written more")
        manifest = self.manifest.first_units(there if units is None else units)
        last = manifest.shards[-1]
        return Cache(self.root, manifest, self._kept_chunks, self.files, last.first_block + last.num_blocks)

    def _first_units(self) -> int:
        """Units before the first that is missing."""
        gaps = (place for place, shard in enumerate(self.manifest.shards) if int(shard.unit) != place)
        return next(gaps, self.num_units)

    def read_blocks(self, start: int, stop: int) -> Blocks:
        """Blocks [start, stop).

        Raises:
            CacheError: the range is not in the cache, or not dumped yet.
            DamagedCacheError: stored bytes differ from what was committed.
        """
        if not 0 <= start < stop <= self.num_blocks:
            held = f"[0, {self.num_blocks})"
            raise CacheError(f"blocks [{start}, {stop}) are outside {self.location}, which holds {held}")
        parts = []
        position = start
        while position < stop:
            ref = self.chunk_of(position)
            last = min(stop, ref.first_block + ref.num_blocks)
            parts.append(cut(self.read_chunk(ref), position - ref.first_block, last - ref.first_block))
            position = last
        return join(parts)

    def read_chunk(self, ref: ChunkRef) -> Blocks:
        """All blocks of one chunk; the last few chunks are kept in memory."""
        # No lock, which a forked child could inherit locked: each step is atomic, and another thread may do it first.
        blocks = self._decoded.get(ref)
        if blocks is None:
            blocks = self._decoded[ref] = self._decode(ref)
        with suppress(KeyError):
            self._decoded.move_to_end(ref)
        while len(self._decoded) > self._kept_chunks:
            with suppress(KeyError):
                self._decoded.popitem(last=False)
        return blocks

    def keep_chunks(self, count: int) -> None:
        """Keep at least `count` decoded chunks in memory (about 12 bytes for each of their entries)."""
        self._kept_chunks = max(self._kept_chunks, count)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Say which shards (numbers) are read next: those of a remote cache begin to be fetched. A hint: no errors."""
        self.files.prefetch([self.manifest.shards[number] for number in shards])

    def close(self) -> None:
        """Release open files and decoded chunks; reading opens them again."""
        self._shards.close()
        self._decoded.clear()

    def _list_chunks(self) -> list[ChunkRef]:
        step = self.manifest.identity.geometry.chunk_blocks
        return [
            ChunkRef(number, index, first, min(step, shard.first_block + shard.num_blocks - first))
            for number, shard in enumerate(self.manifest.shards)
            for index, first in enumerate(range(shard.first_block, shard.first_block + shard.num_blocks, step))
        ]

    def chunk_of(self, block: int) -> ChunkRef:
        """The chunk that holds a block. Raises CacheError when it is not dumped yet."""
        index = bisect.bisect_right(self._chunk_starts, block) - 1
        if index < 0 or block >= self.chunks[index].first_block + self.chunks[index].num_blocks:
            where = f"block {block} of {self.location}"
            raise CacheError(f"{where} is not dumped yet; run the same dump again to finish it")
        return self.chunks[index]

    def _decode(self, ref: ChunkRef) -> Blocks:
        return to_blocks(ref, self.manifest.identity.geometry, *self.read_rows(ref))

    def read_rows(
        self, ref: ChunkRef, memory: Memory = FRESH
    ) -> tuple[NDArray[np.int64], SparseTargets, NDArray[np.bool_] | None]:
        """A chunk's real tokens int64 [R], their rows, and bool [R], which of them count, or None for all.

        Ids are int32 in narrow memory. Raises DamagedCacheError.
        """
        tokens, coded = self.read_coded(ref, memory)
        with self._damage_in(ref):
            return tokens, self.codec.targets(coded, memory), coded.counted

    def read_tokens(self, ref: ChunkRef) -> NDArray[np.int64]:
        """A chunk's real tokens int64 [R], without their rows. Raises DamagedCacheError."""
        return self._tokens_of(ref, self._shards.open(ref.shard).read("tokens", ref.chunk).astype(np.int64))

    def read_counted(self, ref: ChunkRef) -> NDArray[np.bool_] | None:
        """bool [R], which of a chunk's rows count; None for all. Raises DamagedCacheError."""
        if not self.masked:
            return None
        plane = self._shards.open(ref.shard).read("counted", ref.chunk)
        with self._damage_in(ref):
            return self.codec.counted(plane, self._num_rows(ref))

    def read_coded(self, ref: ChunkRef, memory: Memory = FRESH) -> tuple[NDArray[np.int64], CodedRows]:
        """A chunk's real tokens int64 [R] and their rows as integers, for moving rows without rounding them again.

        Raises DamagedCacheError.
        """
        # numpy adds uint64 and int64 as floats; the container keeps all numbers below 2^63.
        planes = {
            name: plane.astype(np.int64) if plane.dtype == np.uint64 else plane
            for name, plane in self.read_planes(ref, memory).items()
        }
        with self._damage_in(ref):
            stored_tokens = planes.pop("tokens")
        tokens = self._tokens_of(ref, stored_tokens)
        with self._damage_in(ref):
            return tokens, self.codec.unpack(tokens, planes, self.codebook(), memory)

    def _tokens_of(self, ref: ChunkRef, plane: Plane) -> NDArray[np.int64]:
        codebook = self.codebook()
        rows = self._num_rows(ref)
        with self._damage_in(ref):
            tokens = codebook.ranks.decode(plane)
            if tokens.size != rows:
                raise DamagedCacheError(f"it holds {tokens.size} tokens, not {rows}")
            return tokens

    def _num_rows(self, ref: ChunkRef) -> int:
        return self.manifest.identity.geometry.tokens_in(ref.first_block, ref.first_block + ref.num_blocks)

    @contextmanager
    def _damage_in(self, ref: ChunkRef) -> Iterator[None]:
        """Say of an error while decoding which shard and chunk it is in."""
        try:
            yield
        except (DamagedCacheError, TargetsError, KeyError) as error:
            shard = self.manifest.shards[ref.shard]
            raise DamagedCacheError(
                f"{self.files.shard_name(shard)}, chunk {ref.chunk} is damaged: {error}; restore the file, or remove "
                "it and dump again",
                shard=shard.file,
                chunk=ref.chunk,
            ) from error

    def read_planes(self, ref: ChunkRef, memory: Memory = FRESH) -> dict[str, Plane]:
        """A chunk's planes as they are stored, unsigned integers [size] each. Raises DamagedCacheError."""
        return self._shards.open(ref.shard).read_chunk(ref.chunk, memory)

    def read_codebook(self) -> dict[str, Plane]:
        """The planes of the codec's tables, checked against the manifest. Raises DamagedCacheError."""
        with self.files.codebook(self.manifest.codebook_sha256) as path:
            return read_codebook(path, Plan(identity=self.manifest.identity).fingerprint)

    def codebook(self) -> Codebook:
        """The codec's tables. Raises DamagedCacheError."""
        if self._codebook is None:
            self._codebook = parse_codebook(self.files.codebook_name, self.read_codebook(), self.vocab_size)
        return self._codebook


def open_cache(
    location: str | Path,
    *,
    partial: bool = False,
    local_dir: str | Path | None = None,
    local_bytes: int | None = None,
) -> Cache:
    """Open a cache for reading; reads the manifest only.

    Args:
        location: a folder path, a file:// URL, or s3://bucket/prefix.
        partial: also open a cache whose dump has not finished, up to its commits at this moment; not of s3://. To train
            on one take its `snapshot`.
        local_dir: where shards of a remote cache are kept, shared by all processes of the machine; by default
            `$LOGITCACHE_LOCAL_DIR`, else `remote` in `cache_home()`.
        local_bytes: how many bytes that folder may hold; by default `$LOGITCACHE_LOCAL_SIZE`, else 50 GB.

    Raises:
        UsageError: a URL of another kind.
        CacheError: there is no cache, or it is unfinished and `partial` is False.
        DamagedCacheError, FormatVersionError: as they say.
        RemoteError: the object store cannot be reached, or refuses.
    """
    place = parse_location(location)
    if isinstance(place, S3Location):
        from logitcache.store.remote import open_remote

        return open_remote(place, local_dir, local_bytes)
    layout = Layout(place)
    if not layout.root.is_dir():
        raise CacheError(f"{layout.root} does not exist or is not a folder; give the folder that `dump --out` wrote")
    if layout.manifest.exists():
        source, manifest = layout.manifest, load_document(layout.manifest, Manifest)
    elif not layout.plan.exists():
        raise CacheError(
            f"{layout.root} is not a logitcache cache: it has no manifest.json and no plan.json; give the folder that "
            "`dump --out` wrote"
        )
    elif not partial:
        raise CacheError(
            f"{layout.root} is unfinished; run the command that began it again to finish it "
            "(`train --partial` and, in Python, open_cache(..., partial=True) read what is there)"
        )
    else:
        plan = load_document(layout.plan, Plan)
        source, manifest = layout.commits, assemble_manifest(Layout(layout.root, plan.identity.container), plan)
    return Cache(layout.root, manifest.uncontradicted(source))
