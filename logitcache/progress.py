"""What long operations report while they run; the command line draws it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

# The stage in which a dump computes.
RUNNING = "running the teacher"


@dataclass(frozen=True)
class WorkerState:
    """One worker of a dump, as its last heartbeat says.

    Args:
        worker: its rank, or what its engine calls it.
        host, pid: where it runs.
        stage: "tokenising", "computing", "waiting", "finished", or "gone" for one that shows no life any more.
        unit: the unit it computes, or None.
        computed_tokens: tokens it put through the teacher.
        tokens_per_second: while it computed; None before it did.
        heartbeat_age: seconds since it last showed life, on the file system's clock.
    """

    worker: str
    host: str
    pid: int
    stage: str
    unit: int | None
    computed_tokens: int
    tokens_per_second: float | None
    heartbeat_age: float


@dataclass(frozen=True)
class Snapshot:
    """All workers of a dump at one moment.

    Args:
        cache: its folder.
        complete: whether the manifest is written.
        done_tokens: committed, and computed in units under way.
        total_tokens: of the corpus; None until it is tokenised.
        committed_units, total_units: likewise.
        tokens_per_second: of all workers together.
        seconds_left: at that speed; None when nobody computes.
        workers: all that were seen since the dump began and have not ended.
    """

    cache: str
    complete: bool
    done_tokens: int
    total_tokens: int | None
    committed_units: int
    total_units: int | None
    tokens_per_second: float
    seconds_left: float | None
    workers: list[WorkerState]


class Progress(Protocol):
    """Told by everything that writes a cache."""

    def stage(self, what: str) -> None:
        """A new stage began, for example loading the teacher."""

    def advance(self, done: int, total: int, computed: int, num_bytes: int) -> None:
        """`done` of `total` tokens are finished, `computed` of them in this run; `num_bytes` of it are written."""

    def note(self, what: str) -> None:
        """Something worth saying once, for example that a worker died and was started again."""

    def workers(self, seen: Snapshot) -> None:
        """What all workers do, every second or so where there are several."""


class Silent:
    """Reports nothing."""

    def stage(self, what: str) -> None:
        pass

    def advance(self, done: int, total: int, computed: int, num_bytes: int) -> None:
        pass

    def note(self, what: str) -> None:
        pass

    def workers(self, seen: Snapshot) -> None:
        pass
