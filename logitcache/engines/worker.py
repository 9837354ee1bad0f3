"""The loop of one worker, the same under every engine: claim a unit, process it, until no output lacks one.

Any process that runs the same dump on the same folder or bucket joins: there is no rank that must live, and none that
counts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from logitcache.dump_checks import refuse_early, refuse_unfit
from logitcache.dump_job import DumpReport, Job, load_teacher
from logitcache.dump_options import DumpOptions
from logitcache.dump_pipeline import Pipeline
from logitcache.dump_unit import PILOT_UNIT, process_unit
from logitcache.engines.bucket_leases import BucketLeases
from logitcache.engines.leases import Lease, Leases
from logitcache.errors import RemoteError
from logitcache.progress import RUNNING, Progress
from logitcache.store import Layout, prepare_place, remove_staging
from logitcache.store.layout import unit_name
from logitcache.store.objects import open_bucket
from logitcache.store.writer import missing_tables
from logitcache.teachers import Teacher

UNIT_PREFIX = "unit-"


def run_worker(options: DumpOptions, progress: Progress, teacher: Teacher | None = None, label: str = "") -> DumpReport:
    """Work on a dump until every unit is committed, whoever did it.

    `teacher` is one loaded already from `options.teacher`; `label` is what people call this worker.

    Raises: as `run_dump`.
    """
    files = refuse_early(options, teacher, prepare_place)
    if teacher is None:
        progress.stage("loading the teacher")
        teacher = load_teacher(options)
    refuse_unfit(options, teacher)
    with ExitStack() as held:
        here = held.enter_context(Leases(Layout(options.outputs[0].root).leases, label, options.lease_seconds))
        leases = held.enter_context(shared_leases(options, label)) if options.outputs[0].url else here
        while True:
            progress.stage("tokenising the corpus")
            here.status = leases.status = lambda: {"stage": "tokenising"}
            job = Job.prepare(options, files, teacher, progress, lambda find, make: here.once("tokens", find, make))
            _take_back_lost(job, leases)
            if job.corpus.has_tokens or not job.pending():
                return _Worker(job, leases).run()
            # What a finished cache needed no tokens for is to be computed again.
            progress.stage("parts of the cache are missing: computing them again")


def shared_leases(options: DumpOptions, label: str) -> Leases:
    """Claims that the workers of all machines see, where the first output is in a bucket."""
    return BucketLeases(open_bucket(options.outputs[0].location), label, options.lease_seconds)


def sweep(options: DumpOptions) -> None:
    """Remove what workers left that were ended while they looked for more work in finished caches."""
    for output in options.outputs:
        layout = Layout(output.root)
        if output.url is not None:
            remove_staging(output.root, output.url)
        elif layout.manifest.exists():
            shutil.rmtree(layout.work, ignore_errors=True)


def _take_back_lost(job: Job, leases: Leases) -> None:
    """Make units pending again that are lost; one worker at a time, so that no new commit is lost."""
    if any(writer.lost_units() for writer in job.writers):
        leases.once("shards", lambda: None, lambda: [writer.forget_lost_units() for writer in job.writers])


class _Worker:
    """One worker in the loop."""

    def __init__(self, job: Job, leases: Leases) -> None:
        self._job, self._leases = job, leases
        self._pipeline = Pipeline()
        self._stage, self._unit = "waiting", -1
        # What was claimed here and is not committed yet: a unit that is computed, and one that is encoded.
        self._held: dict[int, Lease] = {}
        self._began, self._waited = time.perf_counter(), 0.0
        leases.status = self._status

    def run(self) -> DumpReport:
        job = self._job
        job.progress.stage(RUNNING if job.pending() else "nothing left to compute")
        self._began = time.perf_counter()
        with _resumable(), self._pipeline:
            while True:
                # Looked at first: a unit that is committed meanwhile is not pending, either.
                held = set(self._held)
                pending = [unit for unit in job.pending() if unit not in held]
                job.meter.begin(pending)
                if pending:
                    self._work_on(pending)
                elif not self._pipeline.drain():
                    break
        return job.finish(time.perf_counter() - self._began, (self._pipeline.busy, self._pipeline.waited))

    def _work_on(self, pending: list[int]) -> None:
        """Process the first unit that nobody holds, or wait for those who hold the rest."""
        claimed = self._leases.claim(lease_of(unit) for unit in pending)
        if claimed is None:
            if not self._pipeline.drain():
                self._wait()
            return
        before, unit = self._unit, int(claimed.name.removeprefix(UNIT_PREFIX))
        self._held[unit] = claimed
        self._unit, self._stage = unit, "computing"
        process_unit(self._job, unit, self._pipeline, self._await_tables, partial(self._release, unit))
        self._unit = before

    def _release(self, unit: int) -> None:
        """A unit is committed; told by the pipeline's thread."""
        self._leases.release(self._held.pop(unit))

    def _wait(self) -> None:
        began, self._stage = time.perf_counter(), "waiting"
        self._leases.pause()
        self._waited += time.perf_counter() - began
        self._stage = "computing" if self._unit >= 0 else "waiting"

    def _await_tables(self) -> None:
        """Return when every output has its tables; whose maker died has them made here."""
        while any(writer.codebook() is None for writer in self._job.writers):
            for writer in self._job.writers:
                if writer.is_committed(PILOT_UNIT) and writer.codebook() is None:
                    raise missing_tables(writer.layout.codebook)
            self._work_on([PILOT_UNIT])
            # The writers' tables are read here again: nobody may be at them.
            self._pipeline.drain()

    def _status(self) -> dict[str, Any]:
        """What those who watch are told; asked by another thread."""
        meter = self._job.meter
        working = {"unit": self._unit, "in_unit": meter.in_unit} if self._unit >= 0 else {}
        committing = [unit for unit in list(self._held) if unit != self._unit]
        seconds = time.perf_counter() - self._began - self._waited
        return {
            "stage": self._stage,
            **working,
            "committing": committing,
            "computed": meter.computed,
            "seconds": seconds,
        }


@contextmanager
def _resumable() -> Iterator[None]:
    """Let what stops a dump to a bucket say that nothing is lost."""
    try:
        yield
    except RemoteError as error:
        raise RemoteError(f"{error}; what is committed stays, and the same command resumes") from error


def lease_of(unit: int) -> str:
    """The name of a unit's lease."""
    return f"{UNIT_PREFIX}{unit_name(unit)}"
