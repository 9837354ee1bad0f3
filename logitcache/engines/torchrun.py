"""`--engine torchrun`: this process is one worker of several that torchrun, srun or a SLURM array started.

No collectives and no rendezvous: ranks may die, join late or run one after the other. Those that share the cache's
folder share the work. Only with `--tensor-parallel` the ranks are one worker, which lives and dies as a whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from logitcache.dump_checks import refuse_early
from logitcache.dump_job import DumpReport, load_teacher
from logitcache.dump_options import DumpOptions
from logitcache.engines.devices import take_device
from logitcache.engines.watch import Watcher
from logitcache.engines.worker import run_worker
from logitcache.errors import UsageError
from logitcache.progress import RUNNING, Progress, Snapshot
from logitcache.teachers import TensorParallelTeacher

_VIEW_SECONDS = 2.0


@dataclass(frozen=True)
class Rank:
    """Which worker this process is: `rank` of `size`, the `place`-th on its machine."""

    rank: int
    size: int
    place: int

    @classmethod
    def of_environment(cls, variables: Mapping[str, str]) -> Rank:
        """What torchrun or SLURM say. Raises UsageError where neither started this process."""
        names = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
        for rank, size, place in names:
            if rank in variables and size in variables:
                try:
                    return cls(int(variables[rank]), int(variables[size]), int(variables.get(place, "0")))
                except ValueError as error:
                    raise UsageError(f"{rank}, {size} and {place} in the environment must be numbers") from error
        raise UsageError(
            "the engine torchrun finds neither RANK and WORLD_SIZE nor SLURM_PROCID and SLURM_NTASKS; "
            "start the command with torchrun or srun, or use --engine local --workers N"
        )


def run_torchrun(options: DumpOptions, progress: Progress) -> DumpReport:
    """Be one worker of a dump until every unit is committed, by whomever; the first rank speaks for all.

    Raises:
        UsageError: neither torchrun nor SLURM started this process, or workers with a device map share a machine.
        Others: as `run_dump`.
    """
    if options.workers is not None:
        raise UsageError("the engine torchrun has as many workers as torchrun or srun started; leave --workers out")
    me = Rank.of_environment(os.environ)
    array = os.environ.get("SLURM_ARRAY_TASK_ID")
    if options.tensor_parallel:
        _check_launch(me)
    elif options.device_map is None:
        take_device(options.device, me.place)
    elif me.place and "SLURM_GPUS_PER_TASK" not in os.environ:
        raise UsageError(
            f"with --device-map a worker takes all GPUs it sees, and this is worker {me.place + 1} of its machine; "
            "start one on each, or let srun --gpus-per-task divide the GPUs"
        )
    places = [output.location for output in options.outputs]
    watcher = Watcher(places, options.lease_seconds, progress) if me.rank == 0 else None
    view, label = _View(progress, watcher), f"{array}/{me.rank}" if array else str(me.rank)
    report = (
        _one_teacher(options, view, me, label) if options.tensor_parallel else run_worker(options, view, label=label)
    )
    return replace(report, speaks=me.rank == 0)


def _check_launch(me: Rank) -> None:
    """Raise UsageError unless the ranks of this launch can meet."""
    lacking = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking or me.size < 2:
        found = f"{lacking[0]} is not set" if lacking else "there is one"
        raise UsageError(
            f"--tensor-parallel makes one teacher of several ranks, and {found}; start the command with torchrun "
            "--nproc-per-node and the number of GPUs"
        )


def _one_teacher(options: DumpOptions, view: _View, me: Rank, label: str) -> DumpReport:
    """Rank 0 is the one worker of this launch; the others compute their share of its teacher."""
    refuse_early(options)
    view.stage("loading the teacher")
    teacher = load_teacher(options)
    assert isinstance(teacher, TensorParallelTeacher)
    if me.rank:
        teacher.follow()
        return DumpReport(0, 0, 0.0)
    try:
        report = run_worker(options, view, teacher, label)
    except BaseException:
        teacher.dismiss(failed=True)
        raise
    teacher.dismiss()
    return report


class _View:
    """What one rank has to show: the first what all workers do, the others only what is worth a line."""

    def __init__(self, progress: Progress, watcher: Watcher | None) -> None:
        self._progress, self._watcher = progress, watcher
        self._last = 0.0
        self.note = progress.note

    def stage(self, what: str) -> None:
        # The watcher itself says when the teacher runs.
        if self._watcher is not None and what != RUNNING:
            self._progress.stage(what)

    def advance(self, done: int, total: int, computed: int, num_bytes: int) -> None:
        if self._watcher is not None and time.monotonic() - self._last > _VIEW_SECONDS:
            self._last = time.monotonic()
            self._watcher.show()

    def workers(self, seen: Snapshot) -> None:
        self._progress.workers(seen)
