"""The three JSON documents of a cache as pydantic models: plan, commit record and manifest. FORMAT.md explains them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from logitcache.errors import DamagedCacheError, FormatVersionError, UsageError
from logitcache.selection import Selection
from logitcache.store.files import digest, parse_checked_json, read_checked_json
from logitcache.store.layout import SUFFIXES, ContainerKind

FORMAT_VERSION: Literal[1] = 1
MAX_CHUNKS = 1 << 22
MAX_ROW_ENTRIES = 65_535
# No container holds a chunk in fewer bytes.
LEAST_CHUNK_BYTES = 64
# What a new cache's geometry is planned for.
CHUNK_TOKENS = 1 << 16
CHUNK_ENTRIES = 1 << 20
LEAST_UNIT_TOKENS, MOST_UNIT_TOKENS = 1 << 14, 1 << 22

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

    Args:
        num_tokens: real tokens of all blocks.
        short_blocks: `[block, tokens]`, ascending, of each block before the last that holds fewer tokens than
            `block_length`, as where corpora were merged. The last block holds what is left of `num_tokens`.
    """

    num_tokens: Positive
    block_length: Annotated[int, Field(ge=2, le=1 << 24)]
    chunk_blocks: Positive
    unit_blocks: Positive
    short_blocks: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = []

    @model_validator(mode="after")
    def _check_short_blocks(self) -> Self:
        blocks = [block for block, _ in self.short_blocks]
        if any(not 1 <= tokens < self.block_length for _, tokens in self.short_blocks):
            raise ValueError(f"a short block must hold 1 to {self.block_length - 1} tokens")
        if blocks != sorted(set(blocks)) or (blocks and blocks[-1] >= self.num_blocks - 1):
            raise ValueError("short blocks must be listed once each, ascending, and lie before the last block")
        return self

    @classmethod
    def planned(cls, num_tokens: int, block_length: int, row_size: int, unit_tokens: int | None = None) -> Geometry:
        """Chunks of at most 65,536 tokens, fewer where rows are long; units of about 1/32 of the corpus.

        Units do not depend on the rows, and a smaller chunk divides a larger one: caches that are dumped together are
        those that would have been dumped apart.

        Args:
            row_size: entries that a row may have.
            unit_tokens: tokens to commit at once, instead of that share.
        """
        longest = _power_of_two(CHUNK_TOKENS // block_length)
        wanted = unit_tokens or min(max(num_tokens // 32, LEAST_UNIT_TOKENS), MOST_UNIT_TOKENS)
        unit_blocks = max(1, wanted // block_length)
        if unit_blocks >= longest:
            unit_blocks -= unit_blocks % longest
        chunk_blocks = min(longest, _power_of_two(CHUNK_ENTRIES // max(1, row_size) // block_length))
        return cls(
            num_tokens=num_tokens,
            block_length=block_length,
            chunk_blocks=min(chunk_blocks, unit_blocks),
            unit_blocks=unit_blocks,
        )

    @classmethod
    def of_blocks(cls, tokens: Sequence[int], block_length: int, chunk_blocks: int, unit_blocks: int) -> Geometry:
        """The geometry of blocks that hold so many tokens each."""
        return cls(
            num_tokens=sum(tokens),
            block_length=block_length,
            chunk_blocks=chunk_blocks,
            unit_blocks=unit_blocks,
            short_blocks=[[block, count] for block, count in enumerate(tokens[:-1]) if count < block_length],
        )

    @property
    def num_blocks(self) -> int:
        return -(-(self.num_tokens + self._missing_before(None)) // self.block_length)

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
        """Real tokens in blocks [first, stop)."""
        end = min(stop * self.block_length - self._missing_before(stop), self.num_tokens)
        return end - (first * self.block_length - self._missing_before(first))

    def block_tokens(self, first: int, stop: int) -> list[int]:
        """Real tokens of each block of [first, stop)."""
        counts = [self.block_length] * (stop - first)
        if stop == self.num_blocks:
            counts[-1] = self.tokens_in(stop - 1, stop)
        for block, tokens in self.short_blocks:
            if first <= block < stop:
                counts[block - first] = tokens
        return counts

    def locate(self, position: int) -> tuple[int, int]:
        """Block, and place in it, of the `position`-th real token."""
        missing = 0
        for block, tokens in self.short_blocks:
            if position + missing < block * self.block_length + tokens:
                break
            missing += self.block_length - tokens
        return divmod(position + missing, self.block_length)

    def _missing_before(self, stop: int | None) -> int:
        """Positions without a token in the short blocks below `stop`, or in all of them."""
        return sum(self.block_length - tokens for block, tokens in self.short_blocks if stop is None or block < stop)


def _power_of_two(number: int) -> int:
    """The largest one that is not above `number`, at least 1."""
    return 1 << max(number, 1).bit_length() - 1


class StoredSelection(Document):
    """What was kept; see `logitcache.selection.Selection`."""

    method: Literal["top-k", "top-p", "sample", "varopt", "label"]
    size: Count
    mass: float | None = None
    exponent: Annotated[float, Field(gt=0, le=4)] | None = None

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        try:
            _ = self.spec
        except UsageError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def spec(self) -> Selection:
        """The selection it is the stored form of."""
        return Selection.from_dict(self.model_dump())

    @property
    def unbiased(self) -> bool:
        """Whether E[weights] equals the teacher's distribution."""
        return self.spec.unbiased

    @property
    def has_exact_head(self) -> bool:
        """Whether rows say which of their weights are exact probabilities (finite thresholds)."""
        return self.method != "sample"


class Ancestor(Document):
    """One step by which a cache was made from others.

    Args:
        operation: "convert", "derive", "merge" or "subset".
        arguments: what the step was told, and what it measured of its parents.
        parents: fingerprints of the caches it was made from.
    """

    operation: str
    arguments: dict[str, Any] = {}
    parents: list[Sha256]


class Identity(Document):
    """All that determines what a cache means. `dump` resumes only when every field is equal.

    Args:
        teacher: name, revision, files with hashes, dtype, attention and engine versions; `nonfinite` is "mask" where
            rows of NaN or infinite logits are left out.
        tokenizer: sha256 and size, and where it was loaded from.
        vocab_size: rows of the teacher's LM head; every id is below it.
        corpus: files with hashes, documents, packing policy, sha256 of the token stream.
        selection: method, size, mass, exponent.
        seed: of the sampled selections.
        codec: name and parameters.
        container: kind of file that holds shards and tables.
        ancestry: the steps from dumped caches to this one, oldest first; empty for a dumped cache.
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

    @property
    def mean_tail_mass(self) -> float | None:
        """Mass that draws from stored probabilities left out, on average; None where none were made of them."""
        masses = [step.arguments["mean_tail_mass"] for step in self.ancestry if "mean_tail_mass" in step.arguments]
        return masses[0] if masses else None

    @property
    def leaves_out_nonfinite(self) -> bool:
        """Whether rows of NaN or infinite logits are left out."""
        return self.teacher.get("nonfinite") == "mask"

    @property
    def masks_only_nonfinite(self) -> bool:
        """Whether every other position with a next token in its block counts."""
        corpora = [self.corpus]
        for corpus in corpora:
            corpora += corpus.get("merged", [])
        return self.leaves_out_nonfinite and not any("mask_sha256" in corpus for corpus in corpora)


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

    `counters` hold what was met on the way (`counted` positions, `nonfinite` rows). Nothing here depends on when or
    where the unit was computed, so that equal content is equal bytes.
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

    def uncontradicted(self, source: str | Path) -> Self:
        """This manifest, found at `source`. Raises DamagedCacheError when it contradicts itself."""
        if (contradiction := self.contradiction()) is not None:
            raise DamagedCacheError(f"{source} contradicts itself: {contradiction}; restore the file")
        return self

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

    def first_units(self, units: int) -> Manifest:
        """That of the first units alone; its counters are not known unless these are all."""
        if units == len(self.shards):
            return self
        shards = self.shards[:units]
        fingerprint = self.fingerprint_of(Plan(identity=self.identity), self.codebook_sha256, shards)
        changes = {"fingerprint": fingerprint, "complete": False, "counters": {}, "shards": shards}
        return self.model_copy(update=changes)

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
        CacheError: the file cannot be read.
        FormatVersionError: a newer version wrote it.
        DamagedCacheError: it does not have the documented form.
    """
    return _validated(read_checked_json(path), path, path.name, model)


def parse_document(data: bytes, where: str, model: type[Model]) -> Model:
    """`load_document` of bytes that were found at `where`, a URL."""
    return _validated(parse_checked_json(data, where), where, where.rpartition("/")[2], model)


def _validated(fields: dict[str, Any], path: str | Path, name: str, model: type[Model]) -> Model:
    version = fields.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path} has format version {version}, this logitcache reads up to {FORMAT_VERSION}; upgrade logitcache"
        )
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the document"
        raise DamagedCacheError(f"{path} is not a valid {name}: {field}: {first['msg']}; restore the file") from error
