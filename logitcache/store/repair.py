"""Finds the units of a damaged cache that must be computed again, and takes their commits back."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from logitcache.errors import CacheError, DamagedCacheError, FormatVersionError
from logitcache.store.commits import commit_paths, read_commit
from logitcache.store.files import checked_json, fsync_folder, replace, sha256_of_file, write_temporary_bytes
from logitcache.store.layout import Layout, writing
from logitcache.store.location import local_root
from logitcache.store.lock import held_alone
from logitcache.store.retract import take_back
from logitcache.store.schema import Commit, Document, Manifest, Plan, load_document
from logitcache.store.writer import parse_codebook, read_codebook

# The unit whose first chunk the tables are counted from.
_PILOT_UNIT = 0
Model = TypeVar("Model", bound=Document)


@dataclass(frozen=True)
class Repair:
    """Something to be made again.

    Args:
        file: what is damaged or missing, relative to the cache's folder.
        unit: to be computed again; None for plan and manifest, which are written again from each other.
        what: what is wrong with it.
    """

    file: str
    unit: int | None
    what: str


def repair(location: str | Path, *, apply: bool = False) -> list[Repair]:
    """List what is damaged or missing, and with `apply` take back the commits of the units it belongs to.

    The command that made the cache then computes those units only, and as the same bytes. Damaged shards stay where
    they are: the new ones take their place. Damaged tables are removed; unit 0 makes them again.

    Raises:
        CacheError: there is no cache, its plan and manifest are both lost, or, with `apply`, a run is writing to it.
        FormatVersionError: a newer version wrote it.
    """
    root = local_root(location)
    manifest, manifest_wrong = _whole(root / "manifest.json", Manifest)
    plan, plan_wrong = _whole(root / "plan.json", Plan)
    if not any((root / name).exists() for name in ("plan.json", "manifest.json")):
        raise CacheError(
            f"{root} is not a logitcache cache: it holds no plan.json and no manifest.json; check the path"
        )
    if plan is None and manifest is None:
        raise CacheError(f"{root} has neither a plan nor a manifest that can be read ({plan_wrong}); restore plan.json")
    if plan is None:
        assert manifest is not None
        plan = Plan(identity=manifest.identity, origin=manifest.origin)
    layout = Layout(root, plan.identity.container)
    document = layout.plan if layout.plan.exists() else layout.manifest
    with held_alone(document) if apply else nullcontext():
        found = [Repair(layout.plan.name, None, plan_wrong)] if plan_wrong else []
        if manifest_wrong and layout.manifest.exists():
            found.append(Repair(layout.manifest.name, None, manifest_wrong))
        found += _of_units(layout, plan, manifest)
        if apply and found:
            _take_back(layout, plan, found)
    return found


def _whole(path: Path, model: type[Model]) -> tuple[Model | None, str]:
    """A document, or None and what is wrong with it. Raises FormatVersionError."""
    try:
        document = load_document(path, model)
    except FormatVersionError:
        raise
    except CacheError as error:
        return None, str(error)
    contradiction = document.contradiction() if isinstance(document, Manifest) else None
    return (document, "") if contradiction is None else (None, f"{path} contradicts itself: {contradiction}")


def _of_units(layout: Layout, plan: Plan, manifest: Manifest | None) -> list[Repair]:
    """What is wrong with tables, commit records and shards, in unit order."""
    found: list[Repair] = []
    commits: dict[int, Commit] = {}
    for path in commit_paths(layout):
        try:
            commits[int(path.stem)] = read_commit(path, plan)
        except DamagedCacheError as error:
            found.append(Repair(f"commits/{path.name}", int(path.stem), str(error)))
    for shard in manifest.shards if manifest is not None else []:
        path = layout.commit(int(shard.unit))
        if not path.exists():
            found.append(Repair(f"commits/{path.name}", int(shard.unit), f"{path} is missing"))
    tables, wrong = _tables(layout, plan)
    if wrong and (commits or found or layout.codebook.exists()):
        found.append(Repair(str(layout.codebook.relative_to(layout.root)), _PILOT_UNIT, wrong))
    for unit, commit in commits.items():
        if (what := _wrong_with(layout, commit, tables)) is not None:
            found.append(Repair(f"shards/{commit.file}", unit, what))
    return sorted(found, key=lambda item: item.unit or 0)


def _tables(layout: Layout, plan: Plan) -> tuple[str | None, str]:
    """The hash of the tables; None, and what is wrong with them, where they cannot be used."""
    if not layout.codebook.exists():
        return None, f"{layout.codebook} is missing"
    try:
        planes = read_codebook(layout.codebook, plan.fingerprint)
        parse_codebook(layout.codebook, planes, plan.identity.vocab_size)
    except CacheError as error:
        return None, str(error)
    return sha256_of_file(layout.codebook), ""


def _wrong_with(layout: Layout, commit: Commit, tables: str | None) -> str | None:
    """Why a committed unit is to be computed again, or None."""
    path = layout.shards / commit.file
    try:
        if sha256_of_file(path) != commit.sha256:
            return f"{path} is damaged: its content differs from its commit record"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if tables is not None and commit.codebook_sha256 != tables:
        return f"{path} was encoded with other tables than those of {layout.codebook}"
    return None


def _take_back(layout: Layout, plan: Plan, found: list[Repair]) -> None:
    """Make the units pending. Killed half-way this leaves an unfinished cache, in which repair finds the rest."""
    take_back(layout, sorted({item.unit for item in found if item.unit is not None}))
    with writing(layout.root):
        if any(item.file.startswith("codebook/") for item in found):
            layout.codebook.unlink(missing_ok=True)
            if layout.codebook.parent.is_dir():
                fsync_folder(layout.codebook.parent)
        if any(item.file == layout.plan.name for item in found):
            data = checked_json(plan.model_dump(mode="json"))
            replace(write_temporary_bytes(layout.root, layout.plan.name, data), layout.plan)
