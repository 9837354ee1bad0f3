"""A cache in the other container: the same planes, tables and records, committed as a dump commits them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from logitcache.errors import DamagedCacheError, UsageError
from logitcache.store.blocks import ChunkRef
from logitcache.store.cache import Cache, open_cache
from logitcache.store.commits import read_commits
from logitcache.store.differences import Wording
from logitcache.store.layout import ContainerKind, Layout, refuse_sources
from logitcache.store.location import local_root
from logitcache.store.schema import Ancestor, Manifest, Plan
from logitcache.store.writer import CacheWriter


def convert(
    source: str | Path,
    out: Path,
    container: ContainerKind,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write the cache `source` to `out` with every shard and table in the other kind of file.

    Nothing is decoded: the planes are equal, integer for integer. The new cache's identity is the old one's but for
    `container` and one more line of `ancestry`. Killed at any moment, the same call resumes.

    Args:
        source: a finished cache.
        out: a new folder, or one that this conversion began.
        container: "zarr" or "arrow".
        progress: called with the numbers of finished and of all units.

    Raises:
        UsageError: the cache has that container already, or `out` is it or lies inside it.
        PlanMismatchError: `out` holds another cache.
        CacheError, DamagedCacheError: the source cannot be read, or `out` not be written.
    """
    # Counters stand in the commit records, which a folder has.
    cache = open_cache(local_root(source))
    identity = cache.manifest.identity
    if identity.container == container:
        raise UsageError(f"{cache.root} has container {container} already; choose the other --container")
    refuse_sources(out, [cache.root])
    counters = _counters(cache)
    step = Ancestor(operation="convert", arguments={"container": container}, parents=[cache.fingerprint])
    converted = identity.model_copy(update={"container": container, "ancestry": [*identity.ancestry, step]})
    writer = CacheWriter.open(out, converted, cache.manifest.origin, Wording.of_step(converted))
    if writer.read_codebook() is None:
        writer.publish_codebook(cache.read_codebook())
    pending, total = writer.pending_units(), writer.geometry.num_units
    for done, unit in enumerate(pending, start=total - len(pending)):
        progress(done, total)
        shard = cache.manifest.shards[unit]
        chunks = [cache.read_planes(ref) for ref in _chunks_of(cache, unit)]
        writer.commit_unit(unit, chunks, counters.get(unit), shard.num_entries)
    progress(total, total)
    manifest = writer.finalize()
    cache.close()
    return manifest


def _chunks_of(cache: Cache, shard: int) -> list[ChunkRef]:
    return [ref for ref in cache.chunks if ref.shard == shard]


def _counters(cache: Cache) -> dict[int, dict[str, int]]:
    """Each unit's counters. They stand in the commit records only; the manifest has their sums."""
    if not cache.manifest.counters:
        return {}
    layout, plan = Layout(cache.root), Plan(identity=cache.manifest.identity)
    found = {int(commit.unit): commit.counters for commit in read_commits(layout, plan)}
    if len(found) != len(cache.manifest.shards):
        raise DamagedCacheError(f"{layout.commits} lacks records of units, which hold counters; restore them")
    return found
