"""Advisory claims on pieces of work, as files that all workers see. No lock service, no clock of any machine.

A lease is the file `NAME.GENERATION`, created exclusively; its owner touches it every few seconds. One that is not
touched for `term` seconds, by the file system's own clock, may be taken over: whoever creates the next generation has
it. So two workers never win the same generation, nothing is renamed, and an owner that was only stopped keeps its old
file and notices nothing. It may go on and commit: commits are create-only, leases only save double work.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from logitcache.engines.owner import known_dead, this_process
from logitcache.errors import CacheError
from logitcache.store.layout import writing

TERM_SECONDS = 60.0
# So many heartbeats may be lost before a lease is, and so often is there one.
_BEATS, _LONGEST_BEAT = 20, 2.0
_LONGEST_PAUSE = 1.0
# A worker that shows no life for so many terms is no longer shown, either.
_FORGOTTEN_TERMS = 10
MOST_BYTES = 1 << 16
FILE_NAME = re.compile(r"([a-z0-9-]+)\.([0-9]{6})", re.ASCII)
WORKER_PREFIX = "worker-"

Value = TypeVar("Value")


@dataclass(frozen=True)
class LeaseFile:
    """A lease as others see it: `touched` is its last heartbeat on the file system's clock, `owner` what it says.

    Among objects `version` is another where the owner says something else.
    """

    name: str
    generation: int
    touched: float
    owner: dict[str, Any]
    version: str = ""

    def expired(self, now: float, term: float) -> bool:
        """Whether it may be taken over."""
        return now - self.touched > term or known_dead(self.owner)


class Lease:
    """A claim of this process, held until it is released or, as a context manager, left."""

    def __init__(self, leases: Leases, name: str, path: Path, handle: int) -> None:
        self.name, self.path, self.handle = name, path, handle
        self._leases = leases

    @property
    def generation(self) -> int:
        return int(self.path.suffix[1:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leases.release(self)


class Leases:
    """The claims of one worker in one folder; use as a context manager.

    Nothing is written before the first claim. On leaving, what is held is released, and the folders are removed where
    nothing else is in them.

    Args:
        folder: the same for all workers.
        label: what people call this worker, for example its rank.
        term: seconds without a heartbeat after which a lease may be taken over.

    Attributes:
        status: what this worker does, for those who watch; called with every heartbeat.
    """

    forgotten_terms = _FORGOTTEN_TERMS
    beats, longest_beat, longest_pause = _BEATS, _LONGEST_BEAT, _LONGEST_PAUSE

    def __init__(self, folder: Path, label: str = "", term: float = TERM_SECONDS) -> None:
        self.folder, self.term = folder, term
        self._owner = {"label": label, "worker": secrets.token_hex(6), **this_process()}
        self.status: Callable[[], dict[str, Any]] = dict
        self._held: dict[Path, Lease] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._presence: Lease | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._leave()
        except BaseException:
            # A signal in the middle: what it interrupted is done again.
            self._leave()
            raise

    def _leave(self) -> None:
        self._closed.set()
        with self._lock:
            held = list(self._held.values())
        for lease in held:
            self.release(lease)
        self._remove_forgotten()
        if self._presence is not None:
            self._end()

    def _remove_forgotten(self) -> None:
        """Remove leases of this worker that a signal in the middle of a claim or a release kept from being noted."""
        _discard(self._unnamed)
        for lease in read_leases(self.folder):
            if lease.owner.get("worker") == self._owner["worker"]:
                _discard(self.folder / file_name(lease.name, lease.generation))

    # ------------------------------------------------------------------------------------------ claims

    def claim(self, names: Iterable[str]) -> Lease | None:
        """The first of these that nobody holds, or whose holder is gone; None when there is none.

        Raises:
            CacheError: the folder cannot be written.
        """
        with writing(self.folder):
            now = self._join()
            there = {lease.name: lease for lease in self._there()}
            for name in names:
                held = there.get(name)
                if held is not None and not held.expired(now, self.term):
                    continue
                lease = self._create(name, 0 if held is None else held.generation + 1)
                if lease is not None:
                    return lease
        return None

    def release(self, lease: Lease) -> None:
        """Give a claim back, and remove what overtaken owners left of it."""
        with self._lock:
            if self._held.pop(lease.path, None) is None:
                return
        self._remove(lease)

    def once(self, name: str, find: Callable[[], Value | None], make: Callable[[], Value]) -> Value:
        """What `find` finds, made by whoever holds the lease `name` while all others wait for it."""
        while True:
            found = find()
            if found is not None:
                return found
            lease = self.claim([name])
            if lease is not None:
                with lease:
                    # Another may have made it between the look and the claim.
                    found = find()
                    return make() if found is None else found
            self.pause()

    def pause(self) -> None:
        """Wait a moment for the work of others."""
        self._closed.wait(min(self.longest_pause, self.term / self.beats))

    # ------------------------------------------------------------------------------------------ heartbeats

    def _begin(self) -> None:
        # Who finishes the cache removes the folder; for others who look a last time it is made again.
        self.folder.mkdir(parents=True, exist_ok=True)

    def _end(self) -> None:
        # The cache's scratch folder and the cache itself may have been made for these leases only.
        for folder in (self.folder, self.folder.parent, self.folder.parent.parent):
            with suppress(OSError):
                folder.rmdir()

    def _join(self) -> float:
        """Show that this worker is there. Returns the time on the file system's clock."""
        self._begin()
        if self._presence is None:
            self._presence = self._create(f"{WORKER_PREFIX}{self._owner['worker']}", 0)
            if self._presence is None:
                raise CacheError(f"{self.folder} was removed while this run began; run the same command again")
            threading.Thread(target=self._keep_beating, name="leases", daemon=True).start()
            self._forget_the_dead()
        return self._clock()

    def _clock(self) -> float:
        """The time on the clock that the folder's file system stamps files with."""
        assert self._presence is not None
        os.utime(self._presence.handle)
        return os.fstat(self._presence.handle).st_mtime

    def _forget_the_dead(self) -> None:
        """Remove what shows workers that are gone: an array of jobs would leave one for each."""
        now = self._clock()
        for lease in read_leases(self.folder):
            if lease.name.startswith(WORKER_PREFIX) and lease.expired(now, self.forgotten_terms * self.term):
                _discard(self.folder / file_name(lease.name, lease.generation))

    def _there(self) -> list[LeaseFile]:
        return read_leases(self.folder)

    def _remove(self, lease: Lease) -> None:
        """Remove a lease that is not held any more, and what overtaken owners left of it."""
        os.close(lease.handle)
        older = [path for path in _files(self.folder, lease.name) if int(path.suffix[1:]) < lease.generation]
        # The youngest last: an older one alone would look like a lease to be taken over, which nothing is lost by.
        for path in (*older, lease.path):
            _discard(path)

    def _create(self, name: str, generation: int) -> Lease | None:
        path = self.folder / file_name(name, generation)
        handle = self._begin_file(path)
        if handle is None:
            return None
        lease = Lease(self, name, path, handle)
        with self._lock:
            self._held[path] = lease
        return lease

    def _begin_file(self, path: Path) -> int | None:
        """Create a lease's file and open it; None where it is there already.

        It says whose it is from its first moment: who dies in this one is then known to be dead, not waited for.
        """
        try:
            handle = os.open(self._unnamed, os.O_CREAT | os.O_RDWR, 0o644)
        except FileNotFoundError:
            return None
        try:
            os.pwrite(handle, json.dumps(self._owner).encode(), 0)
            os.link(self._unnamed, path)
        except BaseException as error:
            os.close(handle)
            if isinstance(error, FileExistsError | FileNotFoundError):
                return None
            raise
        finally:
            self._unnamed.unlink(missing_ok=True)
        return handle

    @property
    def _unnamed(self) -> Path:
        """What is to become a lease of this worker."""
        return self.folder / f"{self._owner['worker']}.tmp"

    def _keep_beating(self) -> None:
        while not self._closed.wait(min(self.longest_beat, self.term / self.beats)):
            self.beat()

    def beat(self) -> None:
        """Touch what is held. A handle follows its own file: what others created under that name is not touched."""
        data = json.dumps({**self._owner, **self.status()}).encode()
        with self._lock:
            for lease in self._held.values():
                # A heartbeat that fails is a lost one; the next may succeed.
                with suppress(OSError):
                    if lease is self._presence:
                        # Padded: it is never shorter than what it replaces, so no reader sees a rest of that.
                        os.pwrite(lease.handle, data.ljust(os.fstat(lease.handle).st_size), 0)
                    os.utime(lease.handle)


def file_name(name: str, generation: int) -> str:
    """Of a lease's file or object."""
    return f"{name}.{generation:06d}"


def _discard(path: Path) -> None:
    """Remove a file, if it is there and can be."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _files(folder: Path, name: str | None = None) -> list[Path]:
    try:
        entries = sorted(os.listdir(folder))
    except OSError:
        return []
    found = [(entry, FILE_NAME.fullmatch(entry)) for entry in entries]
    return [folder / entry for entry, match in found if match and name in (None, match[1])]


def read_leases(folder: Path) -> list[LeaseFile]:
    """The leases in a folder, of each name the latest generation."""
    latest = {path.stem: path for path in _files(folder)}
    found = []
    for name, path in latest.items():
        try:
            # Opening makes network file systems ask the server for the times.
            with path.open("rb") as file:
                touched, data = os.fstat(file.fileno()).st_mtime, file.read(MOST_BYTES)
        except OSError:
            continue
        found.append(LeaseFile(name, int(path.suffix[1:]), touched, owner_in(data)))
    return found


def remove_leases_of_dead(folder: Path) -> None:
    """Remove the leases of processes of this machine that are gone.

    Nobody waits for those: this is for whoever ended them and leaves nothing behind. Another worker may take one over
    at this moment and find it free besides; then a unit is computed twice, and committed once.
    """
    for lease in read_leases(folder):
        if known_dead(lease.owner):
            for path in (*_files(folder, lease.name), folder / f"{lease.owner.get('worker')}.tmp"):
                _discard(path)


def owner_in(data: bytes) -> dict[str, Any]:
    """What a lease says; nothing while its owner writes it."""
    try:
        owner = json.loads(data)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}
