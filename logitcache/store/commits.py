"""The commit records of a cache, and the manifest they make."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from logitcache.errors import DamagedCacheError
from logitcache.store.files import sha256_of_file
from logitcache.store.layout import Layout, unit_name
from logitcache.store.schema import Commit, Manifest, Plan, Shard, load_document

COMMIT_NAME = re.compile(r"[0-9]{6,9}\.json", re.ASCII)


def committed_units(layout: Layout) -> set[int]:
    """Numbers of the units that have a commit record; the records are not read."""
    try:
        names = os.listdir(layout.commits)
    except FileNotFoundError:
        return set()
    return {int(name.partition(".")[0]) for name in names if COMMIT_NAME.fullmatch(name)}


def commit_paths(layout: Layout) -> list[Path]:
    """The commit records there are, in unit order. They are listed: a plan may claim any number of units."""
    found = [path for path in layout.commits.glob("*.json") if COMMIT_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem))


def read_commit(path: Path, plan: Plan) -> Commit:
    """One commit record. Raises DamagedCacheError when it does not belong to this plan."""
    return matching(load_document(path, Commit), int(path.stem), plan, path)


def matching(commit: Commit, unit: int, plan: Plan, where: str | Path) -> Commit:
    """The commit found at `where`. Raises DamagedCacheError when it is not of this unit of the plan."""
    geometry = plan.identity.geometry
    first, stop = geometry.unit_range(unit)
    expected = (plan.fingerprint, unit_name(unit), first, stop - first, geometry.tokens_in(first, stop))
    if (commit.plan, commit.unit, commit.first_block, commit.num_blocks, commit.num_tokens) != expected:
        raise DamagedCacheError(f"{where} belongs to another cache or unit; restore the right file")
    return commit


def read_commits(layout: Layout, plan: Plan) -> list[Commit]:
    """Commit records in unit order. Raises DamagedCacheError when one does not belong to this plan."""
    return [read_commit(path, plan) for path in commit_paths(layout)]


def assemble_manifest(layout: Layout, plan: Plan) -> Manifest:
    """The manifest of all units committed so far; `complete` says whether none is missing."""
    codebook_sha256 = sha256_of_file(layout.codebook) if layout.codebook.exists() else "0" * 64
    return manifest_of(plan, read_commits(layout, plan), codebook_sha256, layout.codebook)


def manifest_of(plan: Plan, commits: Sequence[Commit], codebook_sha256: str, codebook: str | Path) -> Manifest:
    """The manifest of these commits, in unit order, and of the tables at `codebook`. Raises DamagedCacheError."""
    strays = [commit.unit for commit in commits if commit.codebook_sha256 != codebook_sha256]
    if strays:
        raise DamagedCacheError(f"{codebook} is not the table that unit {strays[0]} was encoded with; restore it")
    shards = [Shard.of(commit) for commit in commits]
    counters: dict[str, int] = {}
    for commit in commits:
        for name, count in commit.counters.items():
            counters[name] = counters.get(name, 0) + count
    return Manifest(
        fingerprint=Manifest.fingerprint_of(plan, codebook_sha256, shards),
        complete=len(commits) == plan.identity.geometry.num_units,
        identity=plan.identity,
        origin=plan.origin,
        codebook_sha256=codebook_sha256,
        counters=counters,
        shards=shards,
    )
