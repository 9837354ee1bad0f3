"""The write side of a cache in a bucket: `CacheWriter` for whoever dumps, with create-only objects instead of links.

A shard is written into a folder of this machine, sent, and committed by a record that is created only where there is
none. So a process may be killed at any moment and go on on another machine: records count, in the bucket alone.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from logitcache.errors import CacheError, DamagedCacheError, RemoteError
from logitcache.store.card import CARD, dataset_card
from logitcache.store.commits import COMMIT_NAME, manifest_of, matching
from logitcache.store.container import Plane
from logitcache.store.differences import Wording
from logitcache.store.documents import MANIFEST, MARKER, PLAN, read_document, read_manifest, shard_name
from logitcache.store.files import MAX_JSON_BYTES, checked_json, failpoint, sha256_of_file
from logitcache.store.garbage import SHARD_NAME
from logitcache.store.layout import Layout, unit_name, writing
from logitcache.store.lock import held_alone
from logitcache.store.objects import FETCHES, PIECE_BYTES, Objects, open_objects, pause
from logitcache.store.schema import Commit, Identity, Manifest, Origin, Plan, Shard
from logitcache.store.staging import WORK, copy_documents, keep_copy, refuse_transfer
from logitcache.store.writer import MAX_CODEBOOK_INTEGERS, CacheWriter, missing_tables, refuse_other_plan

# Records on their way at once.
STREAMS = 16
MAX_TABLES_BYTES = 8 * MAX_CODEBOOK_INTEGERS
Result = TypeVar("Result")


def open_writer(
    root: Path,
    identity: Identity,
    origin: Origin | None = None,
    wording: Wording | None = None,
    url: str | None = None,
) -> CacheWriter:
    """Create or resume the cache in a folder, or at `url` with `root` to work in. See `CacheWriter.open`.

    Raises also:
        RemoteError: the object store cannot be reached, or refuses.
    """
    if url is None:
        return CacheWriter.open(root, identity, origin, wording)
    return BucketWriter.begin(open_objects(url), root, identity, origin or Origin(), wording)


class BucketWriter(CacheWriter):
    """The write side of a cache in a bucket; `layout` is that of the folder it works in.

    All methods may raise RemoteError. Whatever fails or is killed, the same dump goes on, here or on another machine.
    """

    def __init__(self, layout: Layout, plan: Plan, objects: Objects) -> None:
        super().__init__(layout, plan)
        self.objects = objects
        self._tables = layout.codebook.relative_to(layout.root).as_posix()

    @classmethod
    def begin(
        cls, objects: Objects, root: Path, identity: Identity, origin: Origin, wording: Wording | None
    ) -> BucketWriter:
        """Create the cache, or resume it; `check_place` has looked before. Raises as `CacheWriter.open`."""
        found = read_document(objects, PLAN, Plan)
        if found is None:
            objects.create(PLAN, checked_json(Plan(identity=identity, origin=origin).model_dump(mode="json")))
            failpoint("plan.written")
            # A copy may have been begun at this moment; it looks for a plan after it wrote its marker.
            refuse_transfer(objects, [MARKER])
            found = read_document(objects, PLAN, Plan)
        if found is None:
            raise CacheError(f"{objects.url(PLAN)} was removed while this run began; run the same command again")
        plan = found[1]
        refuse_other_plan(objects.location, plan, identity, wording)
        layout = Layout(root, identity.container)
        copy_documents(objects, root)
        # What killed runs left, where no other worker of this machine is at work.
        with suppress(CacheError), held_alone(layout.plan):
            shutil.rmtree(layout.shards, ignore_errors=True)
        writer = cls(layout, plan, objects)
        writer._renew_tables()
        return writer

    # ------------------------------------------------------------------------------------------ what is there

    @property
    def complete(self) -> bool:
        return self.objects.size(MANIFEST) is not None

    def pending_units(self) -> list[int]:
        committed = units_in(self.objects)
        return [unit for unit in range(self.geometry.num_units) if unit not in committed]

    def is_committed(self, unit: int) -> bool:
        return self.objects.size(_commit_name(unit)) is not None

    def commits(self) -> list[Commit]:
        return _at_once(self._read_commit, sorted(units_in(self.objects)))

    def lost_units(self) -> list[int]:
        """Committed units whose shard is not there, and of a finished cache those without record.

        Of an unfinished cache those of which no shard is there: its records are read in the end, by `finalize`.
        """
        # What is committed is asked first: what others commit meanwhile then has its shard.
        if (manifest := read_manifest(self.objects)) is not None:
            there = set(self._shards())
            recorded = units_in(self.objects)
            units = ((int(shard.unit), shard.file) for shard in manifest.shards)
            return [unit for unit, file in units if file not in there or unit not in recorded]
        committed = units_in(self.objects)
        return sorted(committed - {int(name.partition("-")[0]) for name in self._shards()})

    def forget_lost_units(self) -> list[int]:
        lost = self.lost_units()
        if lost:
            self._take_back(lost)
        return lost

    def _read_commit(self, unit: int) -> Commit:
        name = _commit_name(unit)
        found = read_document(self.objects, name, Commit)
        if found is None:
            raise CacheError(f"{self.objects.url(name)} was removed at this moment; run the same command again")
        return matching(found[1], unit, self.plan, self.objects.url(name))

    def _shards(self) -> Iterator[str]:
        for name, _ in self.objects.sizes("shards/"):
            if SHARD_NAME.fullmatch(file := name.removeprefix("shards/")):
                yield file

    def _take_back(self, units: Sequence[int]) -> None:
        """Make units pending again."""
        # First the manifest: without it the cache is an unfinished one at every moment.
        for name in (MANIFEST, *map(_commit_name, units)):
            self.objects.remove(name)
            if self.objects.size(name) is not None:
                raise RemoteError(
                    f"{self.objects.url(name)} cannot be removed, though the shard it names is missing; allow "
                    "s3:DeleteObject, or restore the shard"
                )
        self.layout.manifest.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------ tables

    def read_codebook(self) -> dict[str, Plane] | None:
        if not self.layout.codebook.exists():
            self._copy_tables()
        return super().read_codebook()

    def _publish_tables(self, temporary: Path) -> None:
        data = temporary.read_bytes()
        temporary.unlink()
        if self.objects.create(self._tables, data):
            keep_copy(self.layout.codebook, data)
        else:
            self._copy_tables()

    def _renew_tables(self) -> None:
        """Let no other tables than the bucket's be used: the folder may be older than what is there."""
        path = self.layout.codebook
        if path.exists() and not self.objects.has(self._tables, path.stat().st_size, sha256_of_file(path)):
            path.unlink(missing_ok=True)
            self._copy_tables()

    def _copy_tables(self) -> None:
        if (data := self._fetch_tables()) is not None:
            keep_copy(self.layout.codebook, data)

    def _fetch_tables(self) -> bytes | None:
        """The file of the bucket's tables, if there is one."""
        before = ""
        for failures in range(1, FETCHES + 1):
            data = self.objects.read(self._tables, MAX_TABLES_BYTES)
            if data is None:
                return None
            sha256 = hashlib.sha256(data).hexdigest()
            # Who copied them by other means did not say their hash; then they must arrive twice as the same.
            if sha256 == before or self.objects.has(self._tables, len(data), sha256):
                return data
            before = sha256
            pause(failures)
        raise DamagedCacheError(f"{self.objects.url(self._tables)} arrives with other bytes every time; try again")

    # ------------------------------------------------------------------------------------------ committing

    def commit_file(self, temporary: Path, record: Commit) -> bool:
        """Send a finished temporary file, then create the record that commits it. The file is removed.

        Returns False when another worker was first.
        """
        name = _commit_name(int(record.unit))
        data = checked_json(record.model_dump(mode="json"))
        try:
            if self.objects.size(name) is not None:
                return False
            failpoint("bucket.before_upload")
            # Who finished the cache meanwhile has removed the file.
            with writing(self.layout.root):
                name_there = shard_name(Shard.of(record))
                self.objects.put_file(name_there, _File(temporary), record.num_bytes, record.sha256)
            failpoint("bucket.shard_sent")
            created = self.objects.create(name, data)
            failpoint("bucket.committed")
            # The answer to a first try may have been lost.
            return created or self.objects.read(name, MAX_JSON_BYTES) == data
        finally:
            temporary.unlink(missing_ok=True)

    def finalize(self) -> Manifest:
        """Write the manifest once every unit is committed, or take the one there; remove all that is not needed."""
        manifest = read_manifest(self.objects)
        if manifest is None:
            manifest = self._finish()
        elif self.objects.size(self._tables) is None:
            raise missing_tables(self.objects.url(self._tables))
        self._sweep_bucket(manifest)
        shutil.rmtree(self.layout.root, ignore_errors=True)
        return manifest

    def _finish(self) -> Manifest:
        place, commits = self.objects.location, self.commits()
        if missing := self.geometry.num_units - len(commits):
            raise CacheError(f"{place} still lacks {missing} units; run the same dump again")
        there = set(self._shards())
        if lost := [int(commit.unit) for commit in commits if commit.file not in there]:
            self._take_back(lost)
            raise CacheError(f"{place} lost the shards of {len(lost)} units; run the same dump again")
        if (tables := self._fetch_tables()) is None:
            raise missing_tables(self.objects.url(self._tables))
        sha256 = hashlib.sha256(tables).hexdigest()
        manifest = manifest_of(self.plan, commits, sha256, self.objects.url(self._tables))
        num_bytes = len(tables) + sum(commit.num_bytes for commit in commits)
        self.objects.create(CARD, dataset_card(manifest, num_bytes, place).encode())
        failpoint("bucket.before_manifest")
        self.objects.create(MANIFEST, checked_json(manifest.model_dump(mode="json")))
        failpoint("bucket.manifest_written")
        return read_manifest(self.objects) or manifest

    def _sweep_bucket(self, manifest: Manifest) -> None:
        """Remove, where that is allowed, what outrun and killed workers left: a finished cache has no use for it."""
        named = {shard.file for shard in manifest.shards}
        orphans = [f"shards/{file}" for file in self._shards() if file not in named]
        for name in (*orphans, *[name for name, _ in self.objects.sizes(WORK)]):
            self.objects.remove(name)


def units_in(objects: Objects) -> set[int]:
    """Numbers of the units that have a commit record in the bucket."""
    names = (name.removeprefix("commits/") for name, _ in objects.sizes("commits/"))
    return {int(name.partition(".")[0]) for name in names if COMMIT_NAME.fullmatch(name)}


def _commit_name(unit: int) -> str:
    return f"commits/{unit_name(unit)}.json"


def _at_once(read: Callable[[int], Result], units: Sequence[int]) -> list[Result]:
    with ThreadPoolExecutor(STREAMS, thread_name_prefix="logitcache-records") as pool:
        return list(pool.map(read, units))


@dataclass(frozen=True)
class _File:
    """A file that is sent under another name."""

    path: Path

    def url(self, name: str) -> str:
        return str(self.path)

    def stream(self, name: str) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
