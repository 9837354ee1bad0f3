"""Plan, commits and manifest of a finished cache among objects: read, and compared with each other."""

from __future__ import annotations

from typing import TypeVar

from logitcache.errors import DamagedCacheError
from logitcache.store.cache import uncontradicted
from logitcache.store.files import MAX_JSON_BYTES
from logitcache.store.layout import unit_name
from logitcache.store.objects import Objects
from logitcache.store.schema import Commit, Document, Manifest, Plan, Shard, parse_document

MANIFEST, PLAN = "manifest.json", "plan.json"

Model = TypeVar("Model", bound=Document)


def read_manifest(objects: Objects) -> Manifest | None:
    """The manifest, or None where there is none. Raises DamagedCacheError, FormatVersionError."""
    data = objects.read(MANIFEST, MAX_JSON_BYTES)
    if data is None:
        return None
    where = objects.url(MANIFEST)
    return uncontradicted(parse_document(data, where, Manifest), where)


def read_plan(objects: Objects, manifest: Manifest) -> bytes:
    """plan.json, when it is that of the manifest. Raises DamagedCacheError."""
    data, plan = _read(objects, PLAN, Plan)
    if plan.identity != manifest.identity:
        raise DamagedCacheError(f"{objects.url(PLAN)} is not the plan of this manifest; restore the right file")
    return data


def read_commit(objects: Objects, manifest: Manifest, shard: Shard) -> bytes:
    """A unit's commit record, when it is that of the manifest. Raises DamagedCacheError."""
    name = commit_name(shard)
    data, commit = _read(objects, name, Commit)
    plan = Plan(identity=manifest.identity).fingerprint
    if (commit.plan, commit.codebook_sha256, Shard.of(commit)) != (plan, manifest.codebook_sha256, Shard.of(shard)):
        raise DamagedCacheError(f"{objects.url(name)} differs from the manifest; restore the right file")
    return data


def commit_name(shard: Shard) -> str:
    """Name of a unit's commit record in the cache."""
    return f"commits/{unit_name(int(shard.unit))}.json"


def shard_name(shard: Shard) -> str:
    """Name of a unit's file in the cache."""
    return f"shards/{shard.file}"


def _read(objects: Objects, name: str, model: type[Model]) -> tuple[bytes, Model]:
    data = objects.read(name, MAX_JSON_BYTES)
    if data is None:
        raise DamagedCacheError(f"{objects.url(name)} is missing; restore the file")
    return data, parse_document(data, objects.url(name), model)
