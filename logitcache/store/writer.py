"""Creates or resumes a cache, and commits units of it. A unit is committed once, whoever finishes it first."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codec import Codebook, CodedRows, Planes, RowCodec
from logitcache.errors import (
    CacheError,
    DamagedCacheError,
    FormatVersionError,
    PlanMismatchError,
    TargetsError,
    counted,
)
from logitcache.selection import chunk_uniforms
from logitcache.store.commits import assemble_manifest, committed_units, read_commits
from logitcache.store.container import Container, Plane, open_container, write_container
from logitcache.store.differences import Wording, diff_identities
from logitcache.store.files import (
    checked_json,
    failpoint,
    fsync_folder,
    make_durable,
    publish,
    replace,
    sha256_of_file,
    write_temporary,
    write_temporary_bytes,
)
from logitcache.store.layout import Layout, outrun, refuse_file, refuse_inside_cache, unit_name, writing
from logitcache.store.lock import hold_shared
from logitcache.store.retract import take_back
from logitcache.store.schema import (
    FORMAT_VERSION,
    Commit,
    Identity,
    Manifest,
    Origin,
    Plan,
    load_document,
    most_integers,
)
from logitcache.targets import SparseTargets

MAX_CODEBOOK_INTEGERS = 1 << 26


class CacheWriter:
    """The write side of one cache folder.

    `open` creates the cache or picks up an unfinished one; `encode` turns a chunk's rows into planes;
    `commit_unit` makes a unit durable; `finalize` writes the manifest.
    """

    def __init__(self, layout: Layout, plan: Plan) -> None:
        self.layout, self.plan = layout, plan
        self.identity, self.geometry = plan.identity, plan.identity.geometry
        self.codec = RowCodec.from_dict(plan.identity.codec)
        self._codebook: Codebook | None = None
        self._codebook_sha256 = ""
        weakref.finalize(self, hold_shared(layout.plan).close)

    @classmethod
    def open(
        cls, root: Path, identity: Identity, origin: Origin | None = None, wording: Wording | None = None
    ) -> CacheWriter:
        """Create the cache at `root`, or resume it. `wording` is for the message about another plan.

        Raises:
            PlanMismatchError: the folder holds a cache of another plan; `differences` says how it differs.
            UsageError: the folder lies inside another cache.
            CacheError: the folder holds something else, or cannot be written.
        """
        layout = Layout(root, identity.container)
        check_folder(layout)
        if not layout.plan.exists():
            if layout.manifest.exists():
                finished = load_document(layout.manifest, Manifest)
                refuse_other_plan(root, Plan(identity=finished.identity), identity, wording)
            with outrun(layout.plan.exists), writing(root):
                plan = Plan(identity=identity, origin=origin or Origin())
                plan_json = checked_json(plan.model_dump(mode="json"))
                # Before the plan: a cache that has one does not vanish with its folder when the power fails.
                make_durable(root)
                publish(write_temporary_bytes(root, "plan.json", plan_json), layout.plan)
            failpoint("plan.written")
        plan = load_document(layout.plan, Plan)
        refuse_other_plan(root, plan, identity, wording)
        return cls(layout, plan)

    @property
    def complete(self) -> bool:
        """Whether the manifest is written."""
        return self.layout.manifest.exists()

    def pending_units(self) -> list[int]:
        """Units without a commit record, ascending."""
        committed = committed_units(self.layout)
        return [unit for unit in range(self.geometry.num_units) if unit not in committed]

    def is_committed(self, unit: int) -> bool:
        """Whether a unit has its commit record."""
        return self.layout.commit(unit).exists()

    def lost_units(self) -> list[int]:
        """Units that are committed and whose shard is gone; of a finished cache also those without commit record."""
        lost = [int(commit.unit) for commit in self.commits() if not os.path.lexists(self.layout.shards / commit.file)]
        return sorted({*lost, *self.pending_units()}) if self.complete else lost

    def forget_lost_units(self) -> list[int]:
        """Take back the commits of units that are lost, and the manifest that lists them.

        Returns the units, which are then pending again. Files that are there stay, damaged or not.
        """
        lost = self.lost_units()
        if lost:
            take_back(self.layout, lost)
        return lost

    def codebook(self) -> Codebook | None:
        """The cache's tables, or None when they are not written yet. Raises DamagedCacheError."""
        if self._codebook is None and (planes := self.read_codebook()) is not None:
            self._codebook = parse_codebook(self.layout.codebook, planes, self.identity.vocab_size)
        return self._codebook

    def publish_pilot(self, tokens: NDArray[np.int64], targets: SparseTargets) -> Codebook:
        """Write the tables counted from a pilot, unless another worker did, and return those there.

        `tokens` int64 [N] are those at the positions of the pilot's N rows.
        """
        tables = Codebook.from_pilot(tokens, targets, self.identity.vocab_size, self.codec.needs_contexts)
        stored = self.publish_codebook(tables.to_planes())
        self._codebook = parse_codebook(self.layout.codebook, stored, self.identity.vocab_size)
        return self._codebook

    def read_codebook(self) -> dict[str, Plane] | None:
        """The tables' planes, or None when they are not written yet. Raises DamagedCacheError."""
        if not self.layout.codebook.exists():
            return None
        planes = read_codebook(self.layout.codebook, self.plan.fingerprint)
        self._codebook_sha256 = sha256_of_file(self.layout.codebook)
        return planes

    def publish_codebook(self, planes: Mapping[str, Plane]) -> dict[str, Plane]:
        """Write the tables the codec needs, unless another worker did, and return those there."""
        _check_integers("codebook", [planes], MAX_CODEBOOK_INTEGERS)
        attributes = self._attributes("codebook")
        with outrun(self.layout.codebook.exists), writing(self.layout.root):
            temporary = write_temporary(
                self.layout.codebook.parent,
                "tables",
                lambda path: write_container(self.identity.container, path, [planes], attributes),
            )
            self._publish_tables(temporary)
        failpoint("codebook.written")
        stored = self.read_codebook()
        assert stored is not None
        return stored

    def _publish_tables(self, temporary: Path) -> None:
        """Give the file of the tables its name, unless there are some."""
        publish(temporary, self.layout.codebook)
        fsync_folder(self.layout.root)

    def encode(
        self,
        first_block: int,
        tokens: NDArray[np.int64],
        targets: SparseTargets,
        counted: NDArray[np.bool_] | None = None,
    ) -> Planes:
        """Planes of one chunk. The cache's first chunk is the pilot that its tables are counted from.

        Args:
            first_block: number of the chunk's first block; with the seed it settles how values are rounded.
            tokens: int64 [N], the chunk's real tokens.
            targets: their N rows.
            counted: of a masked cache, bool [N], which rows count; nothing of the others is stored.

        Raises:
            TargetsError: a value cannot be stored; the message names the row.
        """
        if self.codebook() is None:
            self.publish_pilot(tokens, targets)
        return self.pack(tokens, self.code(first_block, targets, counted))

    def code(self, first_block: int, targets: SparseTargets, counted: NDArray[np.bool_] | None = None) -> CodedRows:
        """The rows from `first_block` on as integers, rounded as `encode` rounds them. Raises TargetsError."""
        return self.codec.code(targets, chunk_uniforms(self.identity.seed, first_block), counted)

    def pack(self, tokens: NDArray[np.int64], coded: CodedRows) -> Planes:
        """Planes of one chunk whose rows are coded already, perhaps in another cache: nothing is rounded again."""
        codebook = self.codebook()
        assert codebook is not None, "publish_pilot comes first"
        ranks = codebook.ranks.encode(tokens)
        return {"tokens": ranks, **self.codec.pack(tokens, coded, codebook)}

    def commit_unit(
        self,
        unit: int,
        chunks: Sequence[Mapping[str, Plane]],
        counters: Mapping[str, int] | None = None,
        num_entries: int | None = None,
    ) -> int:
        """Write and commit one unit. Returns the shard's bytes; 0 when another worker was first.

        Args:
            unit: its number.
            chunks: the planes of its chunks.
            counters: what was met on the way; of a masked cache the number of rows that count is added.
            num_entries: stored entries of all rows; counted from `ids` by default.
        """
        with outrun(lambda: self.is_committed(unit)):
            return self._commit_unit(unit, chunks, counters, num_entries)
        return 0

    def _commit_unit(
        self,
        unit: int,
        chunks: Sequence[Mapping[str, Plane]],
        counters: Mapping[str, int] | None,
        num_entries: int | None,
    ) -> int:
        first, stop = self.geometry.unit_range(unit)
        num_tokens = self.geometry.tokens_in(first, stop)
        name = unit_name(unit)
        entries = sum(len(chunk.get("ids", ())) for chunk in chunks) if num_entries is None else num_entries
        if self.codec.masked:
            counters = {**(counters or {}), "counted": sum(int(chunk["counted"].sum()) for chunk in chunks)}
        _check_integers("shard", chunks, most_integers(num_tokens, entries))
        attributes = self._attributes("shard", unit=name, first_block=first, num_tokens=num_tokens)
        with writing(self.layout.root, needed_bytes=sum(plane.size for chunk in chunks for plane in chunk.values())):
            failpoint("commit.before_write")
            temporary = write_temporary(
                self.layout.shards,
                name,
                lambda path: write_container(self.identity.container, path, chunks, attributes),
            )
            failpoint("commit.after_write")
            sha256, num_bytes = sha256_of_file(temporary), temporary.stat().st_size
        record = Commit(
            plan=self.plan.fingerprint,
            codebook_sha256=self._codebook_sha256,
            unit=name,
            file=self.layout.shard(unit, sha256).name,
            sha256=sha256,
            num_bytes=num_bytes,
            first_block=first,
            num_blocks=stop - first,
            num_tokens=num_tokens,
            num_entries=entries,
            counters=dict(counters or {}),
        )
        return num_bytes if self.commit_file(temporary, record) else 0

    def commit_file(self, temporary: Path, record: Commit) -> bool:
        """Give a finished temporary file in `shards/` its name, then write the record that commits it.

        Returns False when another worker was first.
        """
        shard = self.layout.shards / record.file
        with writing(self.layout.root):
            replace(temporary, shard)
            # Renaming one hard link of a file onto another leaves both.
            temporary.unlink(missing_ok=True)
            failpoint("commit.after_rename")
            data = checked_json(record.model_dump(mode="json"))
            pending = write_temporary_bytes(self.layout.commits, record.unit, data)
            # The folders of shards and records may be new: no record may be durable before its shard's folder is.
            fsync_folder(self.layout.root)
            failpoint("commit.before_link")
            won = publish(pending, self.layout.commit(int(record.unit)))
            failpoint("commit.after_link")
        return won

    def commits(self) -> list[Commit]:
        """Every commit record there is, in unit order, checked against the plan."""
        return read_commits(self.layout, self.plan)

    def finalize(self) -> Manifest:
        """Write the manifest once every unit is committed (or load the one there), and remove the scratch folder."""
        if not self.complete:
            with outrun(lambda: self.complete):
                self._write_manifest()
        elif not self.layout.codebook.exists():
            raise missing_tables(self.layout.codebook)
        # Also where it was there: a run killed after it left the folder, and so does one that resumes another output.
        self._sweep()
        return load_document(self.layout.manifest, Manifest)

    def _write_manifest(self) -> None:
        missing = self.pending_units()
        if missing:
            raise CacheError(f"{self.layout.root} still lacks {counted(len(missing), 'unit')}; run the same dump again")
        with writing(self.layout.root):
            manifest = assemble_manifest(self.layout, self.plan)
            data = checked_json(manifest.model_dump(mode="json"))
            failpoint("manifest.before_write")
            replace(write_temporary_bytes(self.layout.root, "manifest.json", data), self.layout.manifest)
            failpoint("manifest.written")

    def _sweep(self) -> None:
        """Remove what killed attempts left; a finished cache needs none of it."""
        shutil.rmtree(self.layout.work, ignore_errors=True)
        layout = self.layout
        for folder in (layout.root, layout.shards, layout.commits, layout.codebook.parent):
            for path in folder.glob("*.tmp"):
                path.unlink(missing_ok=True)

    def _attributes(self, role: str, **more: Any) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "role": role, "plan": self.plan.fingerprint, **more}


def missing_tables(where: str | Path) -> DamagedCacheError:
    """What to say of a cache whose tables are gone."""
    return DamagedCacheError(f"{where} is missing; restore it, or run logitcache repair and then the same dump again")


def refuse_other_plan(where: str | Path, plan: Plan, identity: Identity, wording: Wording | None = None) -> None:
    """Raise PlanMismatchError unless the plan found at `where` is for a cache of this identity."""
    differences = diff_identities(plan.identity, identity)
    if differences:
        lines = "".join(f"\n  {line}" for line in (wording or Wording()).lines(plan.identity, identity))
        raise PlanMismatchError(
            f"{where} was begun with other arguments; repeat those or choose another --out. The difference:{lines}",
            differences,
        )


def _check_integers(what: str, chunks: Sequence[Mapping[str, Plane]], limit: int) -> None:
    """Raise TargetsError where a reader would refuse the size of what is about to be written."""
    found = sum(plane.size for chunk in chunks for plane in chunk.values())
    if found > limit:
        raise TargetsError(f"a {what}'s planes hold {found:,} integers, over the format's {limit:,}")


def check_folder(layout: Layout) -> None:
    """Raise CacheError when the folder cannot become, or is not, a cache; UsageError for a file, or inside a cache."""
    root = layout.root
    refuse_inside_cache(root)
    refuse_file(root)
    strangers = {entry.name for entry in root.iterdir()} - {"work"} if root.is_dir() else set()
    strangers = {name for name in strangers if not name.endswith(".tmp")}
    # A finished cache that lost its plan gets it again from whoever would make the same.
    if strangers and not layout.plan.exists() and not layout.manifest.exists():
        example = sorted(strangers)[0]
        raise CacheError(f"{root} is not empty and not a logitcache cache (it holds {example!r}); choose another --out")


def read_codebook(path: Path, plan_fingerprint: str) -> dict[str, Plane]:
    """Read the tables' planes. Raises DamagedCacheError when they are damaged or of another cache."""
    container = open_container(path)
    try:
        check_attributes(container, role="codebook", plan=plan_fingerprint)
        if container.num_chunks != 1 or sum(row[0] for row in container.sizes.values()) > MAX_CODEBOOK_INTEGERS:
            raise DamagedCacheError(f"{path} claims more than a codebook holds; restore the right file")
        return container.read_chunk(0)
    finally:
        container.close()


def parse_codebook(path: str | Path, planes: Mapping[str, Plane], vocab_size: int) -> Codebook:
    """The tables among the planes of the codebook at `path`. Raises DamagedCacheError."""
    try:
        return Codebook.from_planes(dict(planes), vocab_size)
    except DamagedCacheError as error:
        raise DamagedCacheError(f"{path} is damaged: {error}; restore the right file") from error


def check_attributes(container: Container, **expected: Any) -> None:
    """Raise unless a container has these attributes and a format version that is known.

    Raises:
        FormatVersionError: a newer version wrote it.
        DamagedCacheError: it belongs to another cache or unit.
    """
    version = container.attributes.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{container.path} has format version {version}, this logitcache reads up to {FORMAT_VERSION}; "
            "upgrade logitcache"
        )
    wanted = {"format_version": FORMAT_VERSION, **expected}
    if container.attributes != wanted:
        raise DamagedCacheError(
            f"{container.path} is a {container.attributes.get('role', 'file')} of another cache or unit; "
            "restore the right file",
            shard=container.path.name,
        )
