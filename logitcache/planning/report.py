"""What a plan says."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from logitcache.planning.break_even import Costs


@dataclass(frozen=True)
class CorpusFacts:
    """The corpus of a planned dump.

    Args:
        tokens: that the dump would store.
        uncertainty: relative, two standard errors of `tokens`; 0 where they were counted.
        files, bytes: of the whole corpus.
        sample_tokens: that were tried.
        whole: whether that was all of it.
    """

    tokens: int
    uncertainty: float
    files: int
    bytes: int
    sample_tokens: int
    whole: bool


@dataclass(frozen=True)
class StudentFacts:
    """A student on this machine.

    Args:
        student: as it was given.
        tokens_per_second: that it learns from.
    """

    student: str
    tokens_per_second: float


@dataclass(frozen=True)
class PlannedCache:
    """One cache that a dump would write.

    Args:
        select, codec, container: how.
        cache: its folder or URL; None where there is none yet.
        bytes: of all its files.
        bytes_uncertainty: relative, two standard errors; docs/planning.md says what it covers.
        tokens_per_second: of the dump it comes from, by one worker.
        hours: from the start of that dump to its end, by all workers.
        gradient_angle: degrees between the gradient of the LM head from its rows and that of full distillation; None
            for `label`, of which there is no such gradient.
        gradient_variance: squared norm of their difference over that of full distillation's; likewise.
        break_even_students: from so many students on, reading it once each, it takes less time than a live teacher.
        speed_up: time of 1, 2, 4 and 8 students with a live teacher over theirs with the cache, its dump included.
        reader_bytes_per_second: that a student reads; None without one, as is `speed_up`.
    """

    select: str
    codec: str
    container: str
    cache: str | None
    bytes: int
    bytes_uncertainty: float
    bytes_per_token: float
    tokens_per_second: float
    hours: float
    gradient_angle: float | None
    gradient_variance: float | None
    break_even_students: float
    speed_up: dict[str, float] | None = None
    reader_bytes_per_second: float | None = None


@dataclass(frozen=True)
class DumpPlan:
    """What a dump would cost and be worth.

    Args:
        corpus, caches, student: as they say.
        device: what the teacher ran on.
        speed_up: of all workers and machines over one worker.
        loading_seconds, tokenising_seconds: before the first token, in `hours` included.
        gradient_positions: that the gradient's error is of; of an unbiased selection it falls with their number;
            0 where there is none.
        together: whether one dump writes all the caches.
        notes: sentences that one must know to read the numbers.
    """

    corpus: CorpusFacts
    caches: list[PlannedCache]
    student: StudentFacts | None
    device: str
    speed_up: int
    loading_seconds: float
    tokenising_seconds: float
    gradient_positions: int
    together: bool
    notes: list[str] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Of all caches."""
        return sum(cache.bytes for cache in self.caches)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def worth(dump: float, live: float, student: float | None) -> tuple[float, dict[str, float] | None]:
    """Students to break even, and by how much the first few are faster; of seconds a token.

    Args:
        dump: of writing the cache.
        live: that a live teacher adds to a step, at least: its body and head.
        student: of a step from the cache, if that is known.
    """
    costs = Costs(dump, student or 0.0, live + (student or 0.0))
    gains = {str(students): costs.speed_up(students) for students in (1, 2, 4, 8)} if student else None
    return costs.students(), gains
