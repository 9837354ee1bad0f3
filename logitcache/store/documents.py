"""Plan, commits and manifest of a finished cache among objects: read, and compared with each other."""

from __future__ import annotations

from typing import TypeVar

from logitcache.errors import DamagedCacheError
from logitcache.store.files import MAX_JSON_BYTES
from logitcache.store.layout import unit_name
from logitcache.store.objects import FETCHES, Objects, pause
from logitcache.store.schema import Commit, Document, Manifest, Plan, Shard, parse_document

MANIFEST, PLAN = "manifest.json", "plan.json"
# Which cache is being copied here; removed when the copy is whole.
MARKER = "transfer.json"

Model = TypeVar("Model", bound=Document)


def read_manifest(objects: Objects) -> Manifest | None:
    """The manifest, or None where there is none. Raises DamagedCacheError, FormatVersionError."""
    found = read_document(objects, MANIFEST, Manifest)
    return None if found is None else found[1].uncontradicted(objects.url(MANIFEST))


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


def read_document(objects: Objects, name: str, model: type[Model]) -> tuple[bytes, Model] | None:
    """A document, as bytes and as what they say; None where there is none. Raises DamagedCacheError."""
    failures = 0
    while True:
        data = objects.read(name, MAX_JSON_BYTES)
        if data is None:
            return None
        try:
            return data, parse_document(data, objects.url(name), model)
        except DamagedCacheError:
            failures += 1
            if failures == FETCHES:
                raise
            pause(failures)  # it may have been damaged on the way


def _read(objects: Objects, name: str, model: type[Model]) -> tuple[bytes, Model]:
    found = read_document(objects, name, model)
    if found is None:
        raise DamagedCacheError(f"{objects.url(name)} is missing; restore the file")
    return found
