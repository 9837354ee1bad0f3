"""All workers of a dump in one view, from what lies in the cache's folder or bucket."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from logitcache.engines.leases import TERM_SECONDS, WORKER_PREFIX, LeaseFile
from logitcache.engines.sights import Sight, sight_of
from logitcache.errors import CacheError, RemoteError
from logitcache.progress import RUNNING, Progress, Snapshot, WorkerState
from logitcache.store import Geometry


def snapshot(places: Sequence[str | Path], term: float = TERM_SECONDS) -> Snapshot:
    """What the workers of a dump do now.

    Args:
        places: folders or URLs of the dump's outputs, the first one first: there the workers see each other.
        term: seconds without a heartbeat after which a worker counts as gone.

    Raises:
        CacheError: there is no dump, or its plan cannot be read.
        RemoteError: the object store cannot be reached, or refuses.
    """
    return _snapshot([sight_of(place) for place in places], term)


def _snapshot(sights: Sequence[Sight], term: float) -> Snapshot:
    first = sights[0]
    complete = all(sight.complete for sight in sights)
    if not first.begun:
        raise CacheError(f"{first.location} holds no cache and no dump writes one there; check the spelling")
    seen, now = first.leases(), first.clock()
    workers = sorted(
        (_state(lease, now, term) for lease in seen if lease.name.startswith(WORKER_PREFIX)),
        key=lambda state: (len(state.worker), state.worker, state.host, state.pid),
    )
    speed = sum((state.tokens_per_second or 0.0 for state in workers if state.stage == "computing"), 0.0)
    geometry, done = first.geometry(), set[int]()
    if geometry is not None:
        done = set.intersection(*(sight.units() for sight in sights))
    alive = [lease for lease in seen if not lease.expired(now, term)]
    under_way = sum(_in_unit(lease, done) for lease in alive)
    under_way += _tokens(geometry, set().union(*(_committing(lease) for lease in alive)) - done)
    total = geometry.num_tokens if geometry else None
    finished = min(_tokens(geometry, done) + under_way, total or 0)
    return Snapshot(
        cache=first.location,
        complete=complete,
        done_tokens=finished,
        total_tokens=total,
        committed_units=len(done),
        total_units=geometry.num_units if geometry else None,
        tokens_per_second=speed,
        seconds_left=(total - finished) / speed if total is not None and speed else None,
        workers=workers,
    )


class Watcher:
    """Shows the workers of a dump that may not have begun yet.

    Args:
        places, term: as of `snapshot`.
        progress: what is told.
    """

    def __init__(self, places: Sequence[str | Path], term: float, progress: Progress) -> None:
        self._sights, self._term, self._progress = [sight_of(place) for place in places], term, progress
        self._said_running = False
        self._shown = -math.inf

    def look(self) -> Snapshot | None:
        """The workers, or None before there is anything to see."""
        return _snapshot(self._sights, self._term) if self._sights[0].begun else None

    def show(self) -> None:
        """Tell what they do, unless that was told a moment ago and looking costs requests."""
        if time.monotonic() < self._shown + max(sight.pause for sight in self._sights):
            return
        self._shown, seen = time.monotonic(), None
        with suppress(RemoteError):  # a view must end no dump
            seen = self.look()
        if seen is None:
            return
        if seen.total_tokens is not None and not self._said_running:
            self._said_running = True
            self._progress.stage(RUNNING)
        self._progress.workers(seen)

    def done_tokens(self) -> int:
        """Tokens that are committed or under way."""
        seen = self.look()
        return seen.done_tokens if seen else 0

    def committed_units(self) -> int:
        """Units that every output has; 0 where nobody can tell now."""
        with suppress(RemoteError):
            seen = self.look()
            return seen.committed_units if seen else 0
        return 0


def _tokens(geometry: Geometry | None, units: set[int]) -> int:
    return sum(geometry.tokens_in(*geometry.unit_range(unit)) for unit in units) if geometry else 0


def _state(lease: LeaseFile, now: float, term: float) -> WorkerState:
    said = lease.owner
    computed, seconds = _number(said.get("computed")), _number(said.get("seconds"))
    unit = said.get("unit")
    return WorkerState(
        worker=str(said.get("label") or "-"),
        host=str(said.get("host", "")),
        pid=int(_number(said.get("pid"))),
        stage="gone" if lease.expired(now, term) else str(said.get("stage", "starting")),
        unit=unit if isinstance(unit, int) else None,
        computed_tokens=int(computed),
        tokens_per_second=computed / seconds if computed and seconds else None,
        heartbeat_age=max(0.0, now - lease.touched),
    )


def _in_unit(lease: LeaseFile, done: set[int]) -> int:
    """Tokens that a worker computed of a unit that is not committed yet."""
    unit = lease.owner.get("unit")
    return 0 if unit is None or unit in done else int(_number(lease.owner.get("in_unit")))


def _committing(lease: LeaseFile) -> set[int]:
    """Units whose rows a worker has computed, and which it commits now."""
    said = lease.owner.get("committing")
    return {unit for unit in said if isinstance(unit, int)} if isinstance(said, list) else set()


def _number(value: object) -> float:
    return value if isinstance(value, int | float) else 0.0
