"""The three JSON documents of a cache as pydantic models: plan, commit record and manifest. FORMAT.md explains them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from logitcache.errors import DamagedCacheError, FormatVersionError
from logitcache.store.files import digest, read_checked_json
from logitcache.store.layout import SUFFIXES, ContainerKind

FORMAT_VERSION: Literal[1] = 1
MAX_CHUNKS = 1 << 22
MAX_ROW_ENTRIES = 65_535
# No container holds a chunk in fewer bytes.
LEAST_CHUNK_BYTES = 64

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Positive = Annotated[int, Field(ge=1, lt=1 << 62)]
# A name, never a path: nothing in a manifest can point outside the cache folder.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
Unit = Annotated[str, StringConstraints(pattern=r"^[0-9]{6,9}$")]


class Document(BaseModel):
    """Frozen and strict: unknown fields and converted types are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Geometry(Document):
    """How many blocks there are and how they are grouped.

    A block is `block_length` token positions; a chunk is what is decoded at once; a unit is what is committed at once.
    """

    num_tokens: Positive
    block_length: Annotated[int, Field(ge=2, le=1 << 24)]
    chunk_blocks: Positive
    unit_blocks: Positive

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block_length)

    @property
    def num_units(self) -> int:
        return -(-self.num_blocks // self.unit_blocks)

    def unit_range(self, unit: int) -> tuple[int, int]:
        """Blocks [first, stop) of a unit."""
        first = unit * self.unit_blocks
        return first, min(first + self.unit_blocks, self.num_blocks)

    def chunks_in(self, num_blocks: int) -> int:
        """Chunks of a unit of so many blocks."""
        return -(-num_blocks // self.chunk_blocks)

    def tokens_in(self, first: int, stop: int) -> int:
        """Real tokens in blocks [first, stop); only the corpus' last block can hold padding."""
        return min(stop * self.block_length, self.num_tokens) - first * self.block_length


class StoredSelection(Document):
    """What was kept; see `logitcache.selection.Selection`."""

    method: Literal["top-k", "top-p", "sample"]
    size: Positive
    mass: float | None = None


class Ancestor(Document):
    """One step by which a cache was made from others.

    Args:
        operation: what was done, for example "convert".
        arguments: of the operation, JSON values.
        parents: fingerprints of the caches it was made from.
    """

    operation: str
    arguments: dict[str, Any] = {}
    parents: list[Sha256]


class Identity(Document):
    """All that determines what a cache means. `dump` resumes only when every field is equal.

    Args:
        teacher: name, revision, files with hashes, dtype, attention and engine versions.
        tokenizer: sha256 and size, and where it was loaded from.
        vocab_size: rows of the teacher's LM head; every id is below it.
        corpus: files with hashes, documents, packing policy, sha256 of the token stream.
        selection: method, size, mass.
        seed: of the sampled selections.
        codec: name and parameters.
        container: kind of file that holds shards and tables.
        ancestry: how the cache was made from others, oldest step first; empty for a dump.
    """

    teacher: dict[str, Any]
    tokenizer: dict[str, Any]
    vocab_size: Annotated[int, Field(ge=1, le=1 << 32)]
    corpus: dict[str, Any]
    selection: StoredSelection
    seed: Count
    codec: dict[str, Any]
    geometry: Geometry
    container: ContainerKind = "zarr"
    ancestry: list[Ancestor] = []


class Origin(Document):
    """Where the teacher was when the dump began: a hint for finding its tokenizer again, no part of the identity."""

    teacher: str = ""
    gguf_file: str | None = None


class Plan(Document):
    """plan.json: written first."""

    kind: Literal["logitcache-plan"] = "logitcache-plan"
    format_version: Literal[1] = FORMAT_VERSION
    identity: Identity
    origin: Origin = Origin()

    @property
    def fingerprint(self) -> str:
        return digest(self.identity.model_dump(mode="json"))


class Shard(Document):
    """What identifies a unit's file and places it in the corpus; a line of the manifest's shard list."""

    unit: Unit
    file: FileName
    sha256: Sha256
    num_bytes: Positive
    first_block: Count
    num_blocks: Positive
    num_tokens: Positive
    num_entries: Count

    @classmethod
    def of(cls, commit: Shard) -> Shard:
        """The part of a commit record that the manifest keeps."""
        return cls(**{name: getattr(commit, name) for name in cls.model_fields})


class Commit(Shard):
    """commits/<unit>.json: exists if and only if the unit is complete.

    `counters` hold what was met on the way (masked rows, NaN rows). Nothing here depends on when or where the unit was
    computed, so that equal content is equal bytes.
    """

    kind: Literal["logitcache-commit"] = "logitcache-commit"
    format_version: Literal[1] = FORMAT_VERSION
    plan: Sha256
    codebook_sha256: Sha256
    counters: dict[str, Count] = {}


class Manifest(Document):
    """manifest.json: written last; readers need nothing else."""

    kind: Literal["logitcache-manifest"] = "logitcache-manifest"
    format_version: Literal[1] = FORMAT_VERSION
    fingerprint: Sha256
    complete: bool
    identity: Identity
    origin: Origin
    codebook_sha256: Sha256
    counters: dict[str, Count]
    shards: list[Shard]

    def contradiction(self) -> str | None:
        """What the manifest says of itself that cannot be, or None."""
        geometry = self.identity.geometry
        plan = Plan(identity=self.identity)
        if self.fingerprint != self.fingerprint_of(plan, self.codebook_sha256, self.shards):
            return "its fingerprint is not that of its content"
        for shard in self.shards:
            first, stop = geometry.unit_range(int(shard.unit))
            if (shard.first_block, shard.num_blocks) != (first, stop - first) or stop <= first:
                return f"unit {shard.unit} does not hold the blocks that the geometry gives it"
            if shard.num_tokens != geometry.tokens_in(first, stop):
                return f"unit {shard.unit} does not hold the tokens that the geometry gives it"
            if shard.num_entries > MAX_ROW_ENTRIES * shard.num_tokens:
                return f"unit {shard.unit} claims more entries than its rows can have"
            if geometry.chunks_in(shard.num_blocks) > shard.num_bytes // LEAST_CHUNK_BYTES:
                return f"unit {shard.unit} claims more chunks than its bytes can hold"
            if not shard.file.endswith(SUFFIXES[self.identity.container]):
                return f"unit {shard.unit} is not in a file of container {self.identity.container!r}"
        if sum(geometry.chunks_in(shard.num_blocks) for shard in self.shards) > MAX_CHUNKS:
            return f"it claims more than {MAX_CHUNKS:,} chunks"
        units = [int(shard.unit) for shard in self.shards]
        if units != sorted(set(units)) or self.complete != (len(units) == geometry.num_units):
            return "its shards are not the units of the plan"
        return None

    @staticmethod
    def fingerprint_of(plan: Plan, codebook_sha256: str, shards: list[Shard]) -> str:
        """Hash of all that determines meaning: plan, tables and the content of every shard."""
        return digest([plan.fingerprint, codebook_sha256, [shard.sha256 for shard in shards]])


def most_integers(num_tokens: int, num_entries: int) -> int:
    """What all planes of a shard may hold together; a reader refuses more before it allocates them."""
    return 16 * num_tokens + 8 * num_entries + (1 << 16)


Model = TypeVar("Model", bound=Document)


def load_document(path: Path, model: type[Model]) -> Model:
    """Read and validate one JSON document of a cache.

    Raises:
        FormatVersionError: a newer version wrote it.
        DamagedCacheError: it does not have the documented form.
    """
    fields = read_checked_json(path)
    version = fields.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path} has format version {version}, this logitcache reads up to {FORMAT_VERSION}; upgrade logitcache"
        )
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise DamagedCacheError(f"{path} is not a valid {path.name}: {where}: {first['msg']}") from error
