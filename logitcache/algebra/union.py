"""Units of several runs of one plan -> one cache: files are taken over as they are, hashes checked."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from logitcache.algebra.rewrite import Progress, Result
from logitcache.errors import CacheError
from logitcache.store import Cache, CacheWriter, Layout, Manifest
from logitcache.store.cache import check_shard_file
from logitcache.store.files import (
    checked_json,
    failpoint,
    fsync_folder,
    publish,
    replace,
    sha256_of_file,
    write_temporary,
    write_temporary_bytes,
)
from logitcache.store.layout import writing
from logitcache.store.schema import Commit
from logitcache.store.writer import read_commits

Found = tuple[Cache, Commit]


def unite(caches: Sequence[Cache], root: Path, progress: Progress) -> Result:
    """Take over every unit that `root` still lacks from the first cache that holds it; finish when none is missing.

    Raises:
        CacheError: the caches were encoded with different id tables, or `root` cannot be written.
        DamagedCacheError: a source is damaged.
    """
    started = time.perf_counter()
    _refuse_other_tables(caches)
    plan_of = caches[0].manifest
    writer = CacheWriter.open(root, plan_of.identity, plan_of.origin)
    found = _units(caches, writer)
    _take_codebook(caches, writer)
    progress.stage("copying")
    here = {int(commit.unit): commit for commit in writer.commits()}
    conflicts = sorted(unit for unit, holders in found.items() if len(_contents(holders, here.get(unit))) > 1)
    done = sum(commit.num_tokens for commit in here.values())
    copied = num_bytes = 0
    for unit in sorted(found.keys() - here.keys()):
        source, commit = found[unit][0]
        _take_unit(writer, source, commit)
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


def _contents(holders: Sequence[Found], here: Commit | None) -> set[str]:
    """The different contents there are of one unit."""
    return {commit.sha256 for _, commit in holders} | ({here.sha256} if here else set())


def _refuse_other_tables(caches: Sequence[Cache]) -> None:
    """Units can only stand together when their ids were ranked by one table."""
    holders = [cache for cache in caches if cache.manifest.shards]
    for cache in holders[1:]:
        if cache.manifest.codebook_sha256 != holders[0].manifest.codebook_sha256:
            raise CacheError(
                f"{holders[0].root} and {cache.root} are of one plan but have different id tables, because they were "
                "begun apart; finish one of them with its dump, and begin workers from a copy of one begun cache"
            )


def _take_codebook(caches: Sequence[Cache], writer: CacheWriter) -> None:
    source = next((cache for cache in caches if cache.manifest.shards), None)
    if source is None:
        return
    source.codebook()
    target = writer.layout.codebook
    with writing(writer.layout.root):
        if not target.exists():
            publish(_link_or_copy(Layout(source.root).codebook, target.parent, "tables"), target)
            fsync_folder(writer.layout.root)
        failpoint("codebook.written")
    if sha256_of_file(target) != source.manifest.codebook_sha256:
        raise CacheError(
            f"{writer.layout.root} was begun with another id table than {source.root}; choose another folder for --out"
        )


def _take_unit(writer: CacheWriter, source: Cache, commit: Commit) -> None:
    """The commit protocol of FORMAT.md, with a file that exists already."""
    layout = writer.layout
    original, shard = Layout(source.root).shards / commit.file, layout.shards / commit.file
    check_shard_file(original, commit)
    with writing(layout.root, needed_bytes=commit.num_bytes):
        failpoint("commit.before_write")
        temporary = _link_or_copy(original, layout.shards, commit.unit)
        failpoint("commit.after_write")
        if not temporary.samefile(original):
            check_shard_file(temporary, commit)
        replace(temporary, shard)
        # Renaming one hard link of a file onto another leaves both.
        temporary.unlink(missing_ok=True)
        failpoint("commit.after_rename")
        record = checked_json(commit.model_dump(mode="json"))
        pending = write_temporary_bytes(layout.commits, commit.unit, record)
        failpoint("commit.before_link")
        publish(pending, layout.commit(int(commit.unit)))
        fsync_folder(layout.root)
        failpoint("commit.after_link")


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
