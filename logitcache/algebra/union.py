"""Units of several runs of one plan -> one cache, hashes checked."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from logitcache.algebra.rewrite import Result
from logitcache.progress import Progress
from logitcache.store import Cache, CacheWriter, Layout, Manifest
from logitcache.store.access import check_shard_file
from logitcache.store.commits import read_commits
from logitcache.store.files import failpoint, fsync_folder, publish, sha256_of_file, write_temporary
from logitcache.store.layout import outrun, writing
from logitcache.store.schema import Commit

Found = tuple[Cache, Commit]


def unite(caches: Sequence[Cache], root: Path, progress: Progress) -> Result:
    """Take over every unit that `root` still lacks from the first cache that holds it; finish when none is missing.

    Files are taken as they are; units of runs begun apart, which have tables of their own, are packed anew.

    Raises:
        CacheError: `root` cannot be written.
        DamagedCacheError: a source is damaged.
    """
    started = time.perf_counter()
    plan_of = caches[0].manifest
    writer = CacheWriter.open(root, plan_of.identity, plan_of.origin)
    found = _units(caches, writer)
    _take_codebook(caches, writer)
    tables = sha256_of_file(writer.layout.codebook) if found else ""
    progress.stage("copying")
    here = {int(commit.unit): commit for commit in writer.commits()}
    conflicts = sorted(unit for unit, holders in found.items() if _differ(holders, here.get(unit)))
    done = sum(commit.num_tokens for commit in here.values())
    copied = num_bytes = 0
    for unit in sorted(found.keys() - here.keys()):
        source, commit = found[unit][0]
        take = _take_unit if commit.codebook_sha256 == tables else _repack_unit
        take(writer, source, commit)
        copied, num_bytes = copied + commit.num_tokens, num_bytes + commit.num_bytes
        progress.advance(done + copied, writer.geometry.num_tokens, copied, num_bytes)
    missing = writer.pending_units()
    manifest: Manifest | None = None if missing else writer.finalize()
    notes = {"conflicting_units": conflicts, "missing_units": missing}
    return Result(root, done + copied, copied, time.perf_counter() - started, manifest, notes)


def _units(caches: Sequence[Cache], writer: CacheWriter) -> dict[int, list[Found]]:
    """Each unit's holders, in the order the caches were given."""
    found: dict[int, list[Found]] = {}
    for cache in caches:
        for commit in read_commits(Layout(cache.root), writer.plan):
            found.setdefault(int(commit.unit), []).append((cache, commit))
    return found


def _differ(holders: Sequence[Found], here: Commit | None) -> bool:
    """Whether a unit has different contents. Of runs with tables of their own the bytes say nothing."""
    contents: dict[str, set[str]] = {}
    for commit in [*(commit for _, commit in holders), *([here] if here else [])]:
        contents.setdefault(commit.codebook_sha256, set()).add(commit.sha256)
    return any(len(hashes) > 1 for hashes in contents.values())


def _take_codebook(caches: Sequence[Cache], writer: CacheWriter) -> None:
    """Give the new cache the tables of the first cache that has units, unless it has some."""
    source = next((cache for cache in caches if cache.manifest.shards), None)
    if source is None:
        return
    source.codebook()
    target = writer.layout.codebook
    tables = Layout(source.root, writer.identity.container).codebook
    with outrun(target.exists), writing(writer.layout.root):
        if not target.exists():
            publish(_link_or_copy(tables, target.parent, "tables"), target)
            fsync_folder(writer.layout.root)
        failpoint("codebook.written")
    writer.codebook()


def _repack_unit(writer: CacheWriter, source: Cache, commit: Commit) -> None:
    """A unit of a run that was begun apart, with tables of its own: the same rows, ranked by the tables here."""
    chunks = []
    for ref in source.chunks:
        if source.manifest.shards[ref.shard].unit == commit.unit:
            chunks.append(writer.pack(*source.read_coded(ref)))
    writer.commit_unit(int(commit.unit), chunks, commit.counters)


def _take_unit(writer: CacheWriter, source: Cache, commit: Commit) -> None:
    """Commit a file that exists already."""
    layout = writer.layout
    original = Layout(source.root).shards / commit.file
    check_shard_file(original, commit)
    with outrun(lambda: writer.is_committed(int(commit.unit))):
        with writing(layout.root, needed_bytes=commit.num_bytes):
            failpoint("commit.before_write")
            temporary = _link_or_copy(original, layout.shards, commit.unit)
            failpoint("commit.after_write")
            if not temporary.samefile(original):
                check_shard_file(temporary, commit)
        writer.commit_file(temporary, commit)


def _link_or_copy(source: Path, folder: Path, stem: str) -> Path:
    """A temporary file in `folder` with the content of `source`: another name of it, or a copy elsewhere."""

    def fill(path: Path) -> None:
        path.unlink()
        try:
            os.link(source, path)
        except OSError:
            # Another file system, or one without hard links.
            shutil.copyfile(source, path)

    return write_temporary(folder, stem, fill)
