"""What can be seen of a dump from outside: in a folder, or in a bucket. Torch-free; leaves no trace."""

from __future__ import annotations

import os
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path

from logitcache.engines.bucket_leases import listed_leases, said_by_owner
from logitcache.engines.leases import WORKER_PREFIX, LeaseFile, read_leases
from logitcache.store import Geometry, Layout, Plan, load_document
from logitcache.store.bucket_writer import units_in
from logitcache.store.commits import committed_units
from logitcache.store.documents import MANIFEST, PLAN, read_document
from logitcache.store.location import S3Location, parse_location
from logitcache.store.objects import open_bucket
from logitcache.store.objects_s3 import S3Objects


class Sight(ABC):
    """One output of a dump.

    Attributes:
        location: its path or URL.
        pause: seconds between two looks that make no difference.
    """

    location: str
    pause = 0.0

    @property
    @abstractmethod
    def begun(self) -> bool:
        """Whether there is anything to see."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether the manifest is there."""

    @abstractmethod
    def geometry(self) -> Geometry | None:
        """Tokens, blocks and units; None before there is a plan."""

    @abstractmethod
    def units(self) -> set[int]:
        """Committed units."""

    @abstractmethod
    def leases(self) -> list[LeaseFile]:
        """What shows workers, and perhaps what they hold."""

    @abstractmethod
    def clock(self) -> float:
        """The time on the clock that leases are touched by."""


def sight_of(place: str | Path) -> Sight:
    """Of a folder or URL. Raises CacheError for one that is neither."""
    location = parse_location(place)
    return BucketSight(open_bucket(str(location))) if isinstance(location, S3Location) else FolderSight(location)


class FolderSight(Sight):
    """A cache's folder."""

    def __init__(self, root: Path) -> None:
        self._layout, self.location = Layout(root), str(root)

    @property
    def begun(self) -> bool:
        return self._layout.plan.exists() or self._layout.leases.is_dir()

    @property
    def complete(self) -> bool:
        return self._layout.manifest.exists()

    def geometry(self) -> Geometry | None:
        plan = self._layout.plan
        return load_document(plan, Plan).identity.geometry if plan.exists() else None

    def units(self) -> set[int]:
        return committed_units(self._layout)

    def leases(self) -> list[LeaseFile]:
        return read_leases(self._layout.leases)

    def clock(self) -> float:
        """As the folder's file system stamps files; this machine's where nothing runs."""
        try:
            handle, name = tempfile.mkstemp(dir=self._layout.leases, suffix=".tmp")
        except OSError:
            return time.time()
        try:
            return os.fstat(handle).st_mtime
        finally:
            os.close(handle)
            Path(name).unlink(missing_ok=True)


class BucketSight(Sight):
    """A cache in a bucket: every look is a handful of requests."""

    pause = 5.0

    def __init__(self, objects: S3Objects) -> None:
        self._objects, self.location = objects, objects.location
        self._geometry: Geometry | None = None

    @property
    def begun(self) -> bool:
        return self.geometry() is not None

    @property
    def complete(self) -> bool:
        return self._objects.size(MANIFEST) is not None

    def geometry(self) -> Geometry | None:
        if self._geometry is None and (found := read_document(self._objects, PLAN, Plan)) is not None:
            self._geometry = found[1].identity.geometry
        return self._geometry

    def units(self) -> set[int]:
        return units_in(self._objects)

    def leases(self) -> list[LeaseFile]:
        seen = [lease for lease in listed_leases(self._objects) if lease.name.startswith(WORKER_PREFIX)]
        return [said_by_owner(self._objects, lease) for lease in seen]

    def clock(self) -> float:
        return self._objects.clock()
