"""What killed and outrun writers leave in a cache's folder: temporary files, and shards that no record names."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from logitcache.errors import CacheError
from logitcache.store.cache import open_cache
from logitcache.store.commits import read_commits
from logitcache.store.files import fsync_folder
from logitcache.store.layout import Layout, writing
from logitcache.store.location import local_root
from logitcache.store.lock import held_alone
from logitcache.store.schema import Plan

SHARD_NAME = re.compile(r"[0-9]{6,9}-[0-9a-f]{12}\.(zarr\.zip|arrow)", re.ASCII)


@dataclass(frozen=True)
class Leftover:
    """A file that belongs to nothing. `file` is relative to the cache's folder."""

    file: str
    num_bytes: int
    what: str


def collect_garbage(location: str | Path, *, delete: bool = False) -> list[Leftover]:
    """List, and with `delete` remove, orphan shards and temporary files.

    What the manifest or a commit record names is never touched, nor is any file that a cache does not make.

    Raises:
        CacheError: there is no cache, or, with `delete`, a run is writing to it.
        DamagedCacheError: a record cannot be read, so that nobody can tell what it names.
    """
    layout = Layout(local_root(location))
    cache = open_cache(location, partial=True)
    document = layout.plan if layout.plan.exists() else layout.manifest
    with held_alone(document) if delete else nullcontext():
        named = {shard.file for shard in cache.manifest.shards}
        named |= {commit.file for commit in read_commits(layout, Plan(identity=cache.manifest.identity))}
        found = _leftovers(layout, named)
        if delete:
            with writing(layout.root):
                for leftover in found:
                    (layout.root / leftover.file).unlink(missing_ok=True)
                for folder in {(layout.root / leftover.file).parent for leftover in found}:
                    fsync_folder(folder)
    return found


def _leftovers(layout: Layout, named: set[str]) -> list[Leftover]:
    found = []
    for folder in (layout.root, layout.codebook.parent, layout.commits, layout.shards):
        if folder.is_symlink() and folder != layout.root:
            raise CacheError(f"{folder} is a link to somewhere else; run gc on the folder that holds the cache's files")
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            orphan = folder == layout.shards and SHARD_NAME.fullmatch(path.name) and path.name not in named
            temporary = path.name.endswith(".tmp")
            if (orphan or temporary) and (path.is_file() or path.is_symlink()):
                what = "temporary file" if temporary else "shard that no record names"
                found.append(Leftover(str(path.relative_to(layout.root)), path.lstat().st_size, what))
    return found
