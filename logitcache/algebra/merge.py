"""`logitcache merge`: units of several runs of one plan, or caches of different corpora one after another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logitcache.algebra.rewrite import Picked, Result, ancestry_of, rewrite
from logitcache.algebra.union import unite
from logitcache.errors import CacheError, UsageError
from logitcache.progress import Progress, Silent
from logitcache.store import Cache, Geometry, Identity, Plan, open_cache
from logitcache.store.differences import diff
from logitcache.store.files import digest
from logitcache.store.layout import refuse_sources
from logitcache.store.location import local_root

# The same weights under another name or in another version of the engine are the same teacher.
NOT_TEACHER = ("name", "revision", "torch", "transformers")
SUMMED = ("num_tokens", "documents", "empty_documents")


def merge_caches(sources: Sequence[str | Path], root: str | Path, progress: Progress | None = None) -> Result:
    """Write, or go on with, the merged cache of `sources` at `root`.

    Caches of one plan, finished or not, are united: the units that any of them holds are copied (hard-linked where the
    file system can) and the result is the cache one run would have written; call it again with further sources until
    no unit is missing. Of a unit that differs between them, the first one given is taken, and the unit is counted.

    Finished caches of different plans become one: their blocks one after another, with new tables and no value rounded
    again. Teacher, tokenizer, vocabulary, selection, coding of values and block length must be equal; layout, teacher's
    versions and seed are those of the first.

    Raises:
        UsageError: a source is given twice.
        CacheError: the caches cannot be merged; what differs is listed.
        DamagedCacheError: a source is damaged.
    """
    if not sources:
        raise UsageError("there is nothing to merge; give one cache or more")
    root, progress = Path(root), progress or Silent()
    # Units are copied as files, so a folder is needed.
    caches = [open_cache(local_root(source), partial=True) for source in sources]
    refuse_sources(root, [cache.root for cache in caches])
    _refuse_twice([str(cache.root.resolve()) for cache in caches], caches)
    plans = {Plan(identity=cache.manifest.identity).fingerprint for cache in caches}
    if len(plans) == 1:
        return unite(caches, root, progress)
    _refuse_differences(caches)
    _refuse_twice([cache.fingerprint for cache in caches], caches)
    _refuse_contained(caches)
    picked = Picked.whole(caches)
    return rewrite(root, _merged_identity(caches, picked), caches[0].manifest.origin, picked, progress=progress)


def _merged_identity(caches: Sequence[Cache], picked: Picked) -> Identity:
    """The first cache's identity, with the corpora of all and the coarsest grouping of blocks among them."""
    geometries = [cache.manifest.identity.geometry for cache in caches]
    chunk_blocks = max(geometry.chunk_blocks for geometry in geometries)
    unit_blocks = max(geometry.unit_blocks for geometry in geometries)
    geometry = Geometry.of_blocks(
        picked.tokens_of_blocks(), caches[0].block_length, chunk_blocks, unit_blocks - unit_blocks % chunk_blocks
    )
    corpora = [cache.manifest.identity.corpus for cache in caches]
    return caches[0].manifest.identity.model_copy(
        update={
            "corpus": _merged_corpus(corpora),
            "geometry": geometry,
            "ancestry": ancestry_of(caches, "merge", {"blocks": [cache.num_blocks for cache in caches]}),
        }
    )


def _merged_corpus(corpora: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Facts that all corpora share, sums of their sizes, and under `merged` each as it was."""
    first = corpora[0]
    shared = {name: value for name, value in first.items() if all(corpus.get(name) == value for corpus in corpora)}
    sums = {
        name: sum(corpus[name] for corpus in corpora) for name in SUMMED if all(name in corpus for corpus in corpora)
    }
    hashes = {"sha256": digest([corpus.get("sha256") for corpus in corpora])}
    if "mask_sha256" in first:
        hashes["mask_sha256"] = digest([corpus.get("mask_sha256") for corpus in corpora])
    return {**shared, **sums, **hashes, "merged": list(corpora)}


def _refuse_differences(caches: Sequence[Cache]) -> None:
    """Raise CacheError, with what differs, unless rows of all caches mean the same."""
    first = caches[0]
    for other in caches[1:]:
        rows = diff(_meaning(first), _meaning(other)) or diff(_values(first), _values(other), "codec.")
        if rows:
            lines = "".join(f"\n  {field}: {mine!r} and {theirs!r}" for field, mine, theirs in rows)
            raise CacheError(
                f"{first.root} and {other.root} cannot be merged: their rows differ in meaning. The difference:{lines}"
            )
    for cache in caches:
        if not cache.manifest.complete:
            raise CacheError(
                f"{cache.root} is unfinished, and only unfinished caches of one plan can be merged; run its dump again "
                "to finish it"
            )


def _meaning(cache: Cache) -> dict[str, Any]:
    identity = cache.manifest.identity
    unversioned = {name: value for name, value in identity.teacher.items() if name not in NOT_TEACHER}
    return {
        "teacher": unversioned if "sha256" in identity.teacher else identity.teacher,
        "tokenizer": identity.tokenizer.get("sha256"),
        "vocab_size": identity.vocab_size,
        "selection": identity.selection.model_dump(),
        # Draws from stored ids and draws from the teacher are different things under one name.
        "tail_left_out": identity.mean_tail_mass is not None,
        "block_length": identity.geometry.block_length,
    }


def _values(cache: Cache) -> dict[str, Any]:
    """How weights are coded; only a change of it would round them."""
    return {name: value for name, value in cache.manifest.identity.codec.items() if name != "layout"}


def _refuse_twice(names: Sequence[str], caches: Sequence[Cache]) -> None:
    """Raise UsageError when two caches have the same name: folder or fingerprint."""
    for number, name in enumerate(names):
        if name in names[:number]:
            same = caches[names.index(name)].root
            raise UsageError(f"{same} and {caches[number].root} are the same cache; give it once")


def _refuse_contained(caches: Sequence[Cache]) -> None:
    """Raise UsageError when all blocks of one cache are in another already, which was made of it."""
    for cache in caches:
        for other in caches:
            steps = other.manifest.identity.ancestry
            if all(step.operation != "subset" for step in steps) and any(
                cache.fingerprint in step.parents for step in steps
            ):
                raise UsageError(f"{other.root} was made of {cache.root} and holds its blocks already; leave one out")
