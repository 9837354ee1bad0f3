"""Beginning a dump to a bucket: is the place free, and the folder of this machine that its workers work in.

That folder holds the token file, what is being written, and copies of the bucket's plan, manifest and tables. It may be
lost at any time: what counts is in the bucket.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from logitcache.errors import CacheError, LogitcacheError, RemoteError, UsageError
from logitcache.store.card import CARD
from logitcache.store.documents import MANIFEST, MARKER, PLAN, read_document
from logitcache.store.files import replace, write_temporary_bytes
from logitcache.store.layout import Layout, nearest_folder, refuse_inside_cache, writing
from logitcache.store.location import S3Location, cache_home, parse_location
from logitcache.store.objects import Objects, open_objects
from logitcache.store.schema import Manifest, Plan
from logitcache.store.writer import check_folder

WORK = "work/"


def staging_folder(place: S3Location, base: Path | None = None) -> Path:
    """The folder for dumps to a place, the same for all workers: below `base`, else below `cache_home()`.

    Raises UsageError where `base` is a file.
    """
    if base is not None and base.is_file():
        raise UsageError(f"--staging {base} is a file; give a folder to work in")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    name = hashlib.sha256(f"{endpoint} {place}".encode()).hexdigest()[:16]
    return (base or cache_home() / "staging").resolve() / name


def check_place(root: Path, url: str | None = None) -> None:
    """Make sure that a cache can be begun or resumed in a folder, or at `url` with `root` to work in.

    Raises:
        CacheError: something else is there, or it cannot be written.
        UsageError: the folder lies inside a cache.
        RemoteError: the object store cannot be reached, or refuses.
    """
    if url is None:
        check_folder(Layout(root))
        there = nearest_folder(root)
        # What is finished is only read.
        if not Layout(root).manifest.exists() and not os.access(there, os.W_OK | os.X_OK):
            raise CacheError(
                f"{root} cannot be written: this user may not write {there}, or it is mounted read-only; change "
                "that, or choose another --out"
            )
        return
    refuse_inside_cache(root)
    objects = open_objects(url)
    names = {name for name, _ in objects.sizes()}
    refuse_transfer(objects, names)
    if PLAN not in names:
        refuse_inside_bucket_cache(objects.location)
    if PLAN not in names and (strange := _first_stranger(names)) and objects.size(PLAN) is None:
        raise CacheError(f"{url} is not empty and not a logitcache cache (it holds {strange!r}); choose another --out")


def prepare_place(root: Path, url: str | None = None) -> None:
    """`check_place`, and copy plan and manifest from the bucket into the folder to work in."""
    check_place(root, url)
    if url is not None:
        copy_documents(open_objects(url), root)


def remove_staging(root: Path, url: str) -> None:
    """Remove the folder of a dump to a bucket, and scratch objects there, if the cache is finished."""
    objects = open_objects(url)
    with suppress(LogitcacheError):
        if objects.size(MANIFEST) is not None:
            shutil.rmtree(root, ignore_errors=True)
            for name, _ in list(objects.sizes(WORK)):
                objects.remove(name)


def refuse_inside_bucket_cache(url: str) -> None:
    """Raise UsageError where a place in a bucket lies below a cache, whose objects are only its own."""
    place = parse_location(url)
    assert isinstance(place, S3Location)
    parts = place.prefix.split("/") if place.prefix else []
    for count in range(len(parts)):
        outer = open_objects(str(S3Location(place.bucket, "/".join(parts[:count]))))
        # Whoever may only look below the prefix cannot know.
        with suppress(RemoteError):
            if outer.size(PLAN) is not None:
                raise UsageError(f"{url} lies inside the cache {outer.location}; choose another --out")


def refuse_transfer(objects: Objects, names: Iterable[str]) -> None:
    """Raise CacheError where a `push` to this place, which holds `names`, was begun and not ended."""
    if MARKER in names and objects.size(MANIFEST) is None and objects.size(MARKER) is not None:
        raise CacheError(
            f"{objects.location} holds an unfinished copy; run the `logitcache push` that began it again, or choose "
            "another --out"
        )


def copy_documents(objects: Objects, root: Path) -> None:
    """Make plan and manifest in a folder what they are in the bucket."""
    for name, model in ((PLAN, Plan), (MANIFEST, Manifest)):
        found = read_document(objects, name, model)
        with writing(root):
            if found is not None:
                keep_copy(root / name, found[0])
            elif objects.size(name) is None:
                (root / name).unlink(missing_ok=True)


def keep_copy(path: Path, data: bytes) -> None:
    """Write a file, unless it is there with this content."""
    with writing(path.parent, needed_bytes=len(data)):
        if not (path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data):
            replace(write_temporary_bytes(path.parent, path.name, data), path)


def _first_stranger(names: Iterable[str]) -> str | None:
    return next((name for name in sorted(names) if name != CARD and not name.startswith(WORK)), None)
