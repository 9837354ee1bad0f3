"""The same claims as in `leases`, as objects below `work/leases/` in the cache's bucket: for workers of many machines.

A lease is created only where there is none, and written again to show life. All times are the bucket's own clock's.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from logitcache.engines.leases import (
    FILE_NAME,
    MOST_BYTES,
    WORKER_PREFIX,
    Lease,
    LeaseFile,
    Leases,
    file_name,
    owner_in,
)
from logitcache.errors import CacheError, RemoteError
from logitcache.store.objects_s3 import S3Objects

FOLDER = "work/leases"
# The bucket tells times in seconds.
_LEAST_TERM = 10.0


class BucketLeases(Leases):
    """The claims of one worker, where all workers of a cache in a bucket see them. See `Leases`.

    A beat is a request, so there are fewer. Raises RemoteError where `Leases` raises CacheError.
    """

    beats, longest_beat, longest_pause = 6, 10.0, 2.0

    def __init__(self, objects: S3Objects, label: str = "", term: float = 60.0) -> None:
        super().__init__(Path(FOLDER), label, max(term, _LEAST_TERM))
        self._objects = objects
        self._listed: list[LeaseFile] = []
        self._lost = False
        self._owners: dict[tuple[str, int, str], dict[str, Any]] = {}

    def _begin(self) -> None:
        """There are no folders to make."""

    def _end(self) -> None:
        """There are no folders to remove."""

    def _remove_forgotten(self) -> None:
        """Nothing: to find them would take a request for every lease, and nobody touches them, so they expire."""

    def _clock(self) -> float:
        """The time of the last beat that arrived: a little early, which only makes others' leases last longer."""
        assert self._presence is not None
        for _ in range(2):
            self._listed = listed_leases(self._objects)
            for lease in self._listed:
                if lease.name == self._presence.name:
                    return lease.touched
            self.beat()  # who finished the cache has removed it
        return 0.0

    def _there(self) -> list[LeaseFile]:
        """Claims alone. Who owns them is asked once: claims say nothing else, so they stay the same."""
        claims = []
        for lease in self._listed:
            if not lease.name.startswith(WORKER_PREFIX):
                place = (lease.name, lease.generation, lease.version)
                if place not in self._owners:
                    self._owners[place] = said_by_owner(self._objects, lease).owner
                claims.append(replace(lease, owner=self._owners[place]))
        return claims

    def _forget_the_dead(self) -> None:
        now = self._clock()
        for lease in self._listed:
            if lease.name.startswith(WORKER_PREFIX) and lease.expired(now, self.forgotten_terms * self.term):
                self._objects.remove(key_of(lease))

    def _create(self, name: str, generation: int) -> Lease | None:
        path = self.folder / file_name(name, generation)
        data = json.dumps(self._owner).encode()
        # The answer to a first try may have been lost; no two owners say the same.
        created = self._objects.create(path.as_posix(), data)
        if not created and self._objects.read(path.as_posix(), MOST_BYTES) != data:
            return None
        lease = Lease(self, name, path, -1)
        with self._lock:
            self._held[path] = lease
        return lease

    def _remove(self, lease: Lease) -> None:
        if self._lost and self._closed.is_set():
            return
        try:
            all_of_it = listed_leases(self._objects, lease.name)
            older = [key_of(other) for other in all_of_it if other.generation < lease.generation]
            for name in (*older, lease.path.as_posix()):
                self._objects.remove(name)
            self._lost = False
        except RemoteError:
            # It expires then. Who leaves in the middle of an outage is not to wait for every claim in vain.
            self._lost = True

    def beat(self) -> None:
        owner, status = json.dumps(self._owner).encode(), json.dumps({**self._owner, **self.status()}).encode()
        with self._lock:
            held = list(self._held.values())
        for lease in held:
            # A heartbeat that fails is a lost one; the next may succeed.
            with suppress(RemoteError):
                name = lease.path.as_posix()
                self._objects.put(name, status if lease is self._presence else owner)
                with self._lock:
                    released = lease.path not in self._held
                if released:  # meanwhile, and it must not come back
                    self._objects.remove(name)


def listed_leases(objects: S3Objects, name: str | None = None) -> list[LeaseFile]:
    """The leases in a bucket, of each name (or of one, all) the latest generation; their owners are not asked for."""
    found = []
    for key, touched, version in objects.stamps(f"{FOLDER}/"):
        match = FILE_NAME.fullmatch(key.rpartition("/")[2])
        if match and name in (None, match[1]):
            found.append(LeaseFile(match[1], int(match[2]), touched, {}, version))
    if name is not None:
        return found
    return list({lease.name: lease for lease in sorted(found, key=lambda lease: lease.generation)}.values())


def said_by_owner(objects: S3Objects, lease: LeaseFile) -> LeaseFile:
    """The lease with what its owner says."""
    try:
        return replace(lease, owner=owner_in(objects.read(key_of(lease), MOST_BYTES) or b""))
    except CacheError:
        return lease


def key_of(lease: LeaseFile) -> str:
    """Name of its object."""
    return f"{FOLDER}/{file_name(lease.name, lease.generation)}"
