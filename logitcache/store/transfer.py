"""Copies a finished cache to another place: a bucket (`push`), or from there to a folder (`pull`).

A marker is written first and the manifest last, so that a half copy never opens as a whole one and can be told from a
stranger's objects. Files that are there with the right content are skipped, which is what makes a copy resumable.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from logitcache.errors import CacheError, DamagedCacheError, UsageError
from logitcache.store.cache import open_cache
from logitcache.store.card import CARD, dataset_card
from logitcache.store.documents import (
    MANIFEST,
    MARKER,
    PLAN,
    commit_name,
    read_commit,
    read_document,
    read_manifest,
    read_plan,
    shard_name,
)
from logitcache.store.files import MAX_JSON_BYTES, checked_json, failpoint
from logitcache.store.layout import Layout, refuse_file, refuse_inside_cache
from logitcache.store.location import local_root
from logitcache.store.lock import hold_shared
from logitcache.store.objects import LocalObjects, Objects, Source, open_objects
from logitcache.store.schema import Document, Manifest, Sha256, Shard
from logitcache.store.staging import refuse_inside_bucket_cache

# Files on their way at once.
STREAMS = 4

# Called with the bytes that are there and all bytes.
Moved = Callable[[int, int], None]


class Marker(Document):
    """transfer.json: which cache is being copied here."""

    kind: Literal["logitcache-transfer"] = "logitcache-transfer"
    fingerprint: Sha256


@dataclass(frozen=True)
class Transfer:
    """What was copied.

    Args:
        fingerprint: of the cache.
        files: the cache's tables and shards; `sent` of them in this run.
        num_bytes: of those files; `sent_bytes` of them in this run.
        seconds: the run took.
    """

    fingerprint: str
    files: int
    sent: int
    num_bytes: int
    sent_bytes: int
    seconds: float


def push(cache: str | Path, destination: str, progress: Moved = lambda done, total: None) -> Transfer:
    """Copy a finished cache to s3://bucket/prefix (or a folder) and write a dataset card beside it.

    Every file is compared with the manifest as it is sent, and what arrived with what was sent. Killed at any moment,
    the same call goes on; a card that is there is kept.

    Raises:
        CacheError: the destination holds another cache or something else, or the cache is unfinished.
        DamagedCacheError: a file of the cache is not what was committed.
        RemoteError: the object store cannot be reached, or refuses.
    """
    source, target = LocalObjects(local_root(cache)), open_objects(destination)
    return _copy(source, target, progress, card=True)


def pull(source: str, folder: str | Path, progress: Moved = lambda done, total: None) -> Transfer:
    """Copy a finished cache from s3://bucket/prefix (or a folder) to a folder. Otherwise as `push`, without a card."""
    return _copy(open_objects(source), LocalObjects(local_root(folder)), progress, card=False)


def _copy(source: Objects, target: Objects, progress: Moved, card: bool) -> Transfer:
    started = time.monotonic()
    data, manifest = _whole(source)
    _claim(target, source, manifest)
    _put_document(target, PLAN, read_plan(source, manifest))
    # As a writer of the folder, so that `gc` does not take what has no record yet.
    with closing(hold_shared(target.root / PLAN)) if isinstance(target, LocalObjects) else nullcontext():
        files = _files_of(source, manifest)
        num_bytes = sum(file.num_bytes for file in files)
        sent = _copy_files(source, target, manifest, files, _Progress(num_bytes, progress))
        if card:
            target.create(CARD, dataset_card(manifest, num_bytes, target.location).encode())
        failpoint("transfer.before_manifest")
        _put_document(target, MANIFEST, data)
        failpoint("transfer.manifest_written")
        target.remove(MARKER)
    seconds = time.monotonic() - started
    return Transfer(manifest.fingerprint, len(files), len(sent), num_bytes, sum(sent), seconds)


def _whole(source: Objects) -> tuple[bytes, Manifest]:
    """The manifest of a finished cache, as bytes and as what they say."""
    found = read_document(source, MANIFEST, Manifest)
    if found is None:
        open_cache(source.location)  # which says what is there instead
        raise CacheError(f"{source.location} has changed; try again")
    return found[0], found[1].uncontradicted(source.url(MANIFEST))


def _claim(target: Objects, source: Objects, manifest: Manifest) -> None:
    """Make sure that nothing but this cache is, or is being, copied to the target.

    Raises:
        CacheError: something else is there.
        UsageError: it is the source or a file, or lies inside another cache.
    """
    if isinstance(target, LocalObjects):
        refuse_inside_cache(target.root)
        if isinstance(source, LocalObjects) and source.root.resolve() == target.root.resolve():
            raise UsageError(f"{target.location} is the cache to copy; choose another destination")
        refuse_file(target.root, option="")
    if _is_there(target, manifest):
        return
    marker = checked_json(Marker(fingerprint=manifest.fingerprint).model_dump(mode="json"))
    if target.size(MARKER) is None:
        names = {name for name, _ in target.sizes() if _is_strange(name)}
        # Somebody may have begun the same copy at this moment, or even finished it.
        if names and target.size(MARKER) is None and not _is_there(target, manifest):
            _refuse_dump(target, names)
            raise CacheError(f"{target.location} is not empty (it holds {min(names)!r}); choose another destination")
        if not isinstance(target, LocalObjects):
            refuse_inside_bucket_cache(target.location)
        if target.create(MARKER, marker):
            _withdraw_before_dump(target, source, manifest)
            return
    if (begun := read_document(target, MARKER, Marker)) is not None:
        _refuse_other("unfinished copy", target, begun[1].fingerprint, manifest)


def _refuse_dump(target: Objects, names: Iterable[str]) -> None:
    if PLAN in names:
        raise CacheError(
            f"{target.location} holds an unfinished dump; run the command that began it again, or choose another "
            "destination"
        )


def _withdraw_before_dump(target: Objects, source: Objects, manifest: Manifest) -> None:
    """A dump to the same place may have begun at this moment; it looks for a marker after it wrote its plan."""
    plan = target.read(PLAN, MAX_JSON_BYTES)
    if plan is not None and plan != read_plan(source, manifest):
        target.remove(MARKER)
        _refuse_dump(target, [PLAN])


def _is_there(target: Objects, manifest: Manifest) -> bool:
    """Whether the whole cache is at the target. Raises CacheError where another one is."""
    there = read_manifest(target)
    if there is not None:
        _refuse_other("cache", target, there.fingerprint, manifest)
    return there is not None


def _is_strange(name: str) -> bool:
    """Whether it is none of the files that stand where a copy is about to begin: temporary ones are another copy's."""
    return name not in (MARKER, CARD) and not name.endswith(".tmp")


def _refuse_other(what: str, target: Objects, there: str, manifest: Manifest) -> None:
    if there != manifest.fingerprint:
        raise CacheError(
            f"{target.location} holds the {what} {there}, not {manifest.fingerprint}; remove that one, or choose "
            "another destination"
        )


@dataclass(frozen=True)
class _File:
    """A file that is copied as it is; `shard` where it is one."""

    name: str
    num_bytes: int
    sha256: str
    shard: Shard | None = None


def _files_of(source: Objects, manifest: Manifest) -> list[_File]:
    tables = Layout(Path(), manifest.identity.container).codebook.as_posix()
    num_bytes = source.size(tables)
    if num_bytes is None:
        raise DamagedCacheError(f"{source.url(tables)} is missing; restore the file")
    shards = [_File(shard_name(shard), shard.num_bytes, shard.sha256, shard) for shard in manifest.shards]
    return [_File(tables, num_bytes, manifest.codebook_sha256), *shards]


def _copy_files(
    source: Objects, target: Objects, manifest: Manifest, files: list[_File], progress: _Progress
) -> list[int]:
    """Copy what is not there, with each shard its commit record. Returns the sizes of what was sent."""
    pool = ThreadPoolExecutor(STREAMS, thread_name_prefix="logitcache-transfer")
    patient = True
    try:
        jobs = [pool.submit(_copy_file, source, target, manifest, file, progress) for file in files]
        return [sent for job in as_completed(jobs) if (sent := job.result())]
    except Exception:
        raise
    except BaseException:
        patient = False  # Ctrl-C: a connection may be silent for long
        raise
    finally:
        progress.stop()
        pool.shutdown(wait=patient, cancel_futures=True)


def _copy_file(source: Objects, target: Objects, manifest: Manifest, file: _File, progress: _Progress) -> int:
    sent = 0
    if not target.has(file.name, file.num_bytes, file.sha256):
        target.put_file(file.name, _Watched(source, progress), file.num_bytes, file.sha256)
        sent = file.num_bytes
    progress.finished(file.name, file.num_bytes)
    if file.shard is not None:
        _put_document(target, commit_name(file.shard), read_commit(source, manifest, file.shard))
    failpoint("transfer.file_copied")
    return sent


def _put_document(target: Objects, name: str, data: bytes) -> None:
    if target.read(name, MAX_JSON_BYTES) != data:
        target.put(name, data)


class _Stopped(Exception):
    """Another file failed, or the user has had enough."""


class _Progress:
    """Bytes moved so far by all threads."""

    def __init__(self, total: int, report: Moved) -> None:
        self._total, self._report = total, report
        self._moved: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """Let no thread go on."""
        self._stopped = True

    def began(self, name: str) -> None:
        """A file is copied, perhaps once more."""
        with self._lock:
            self._moved[name] = 0

    def moved(self, name: str, count: int) -> None:
        """So many bytes more."""
        if self._stopped:
            raise _Stopped
        with self._lock:
            self._moved[name] += count
            self._report(sum(self._moved.values()), self._total)

    def finished(self, name: str, num_bytes: int) -> None:
        """A file is there."""
        with self._lock:
            self._moved[name] = num_bytes
            self._report(sum(self._moved.values()), self._total)


@dataclass(frozen=True)
class _Watched:
    """A source whose reading is progress."""

    source: Source
    progress: _Progress

    def url(self, name: str) -> str:
        return self.source.url(name)

    def stream(self, name: str) -> Iterator[bytes]:
        self.progress.began(name)
        for piece in self.source.stream(name):
            self.progress.moved(name, len(piece))
            yield piece
