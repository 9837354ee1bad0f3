"""Training by several processes, forked from one that has only imported, and by torchrun; free of pytest.

The processes of a group meet over a file, so no port is taken. accelerate shards on GPUs only: `shard_on_cpu` makes it
take gloo's processes on CPUs for such, and everything else about a sharded run is real.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.faults import forkserver, start


@dataclass(frozen=True)
class Job:
    """One group of processes that train.

    Args:
        values: options of the run.
        world: number of processes; 0 for one that no launcher started.
        resume: go on with a run.
        kill: {rank: step} at whose end it kills itself; at the end of all with step 0, before it writes the student.
        shard: whether accelerate may shard on CPUs.
        on_rank: {rank: options that it alone is given}.
        command: a command line to run in place of `run_training`.
        environment: variables to set.
        folder: where what they print goes, as out0, err0, out1, ...
    """

    values: dict[str, Any] = field(default_factory=dict)
    world: int = 2
    resume: bool = False
    kill: dict[int, int] = field(default_factory=dict)
    shard: bool = False
    on_rank: dict[int, dict[str, Any]] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = Path()


class Nursery:
    """Runs jobs; use as a context manager."""

    def __enter__(self) -> Nursery:
        context = forkserver()
        self._here, there = context.Pipe()
        self._process = start(context, _nurse, there)
        there.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._here.send(None)
        self._process.join()

    def __call__(self, job: Job) -> list[int]:
        """The exit status of each process, by rank."""
        self._here.send(job)
        statuses: list[int] = self._here.recv()
        return statuses


def _nurse(jobs: Any) -> None:
    from logitcache import distill  # noqa: F401  what children need, imported once

    while (job := jobs.recv()) is not None:
        with tempfile.TemporaryDirectory() as folder:
            children = [_fork(job, rank, folder) for rank in range(max(1, job.world))]
            jobs.send([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])


def _fork(job: Job, rank: int, folder: str) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _say_into(job.folder, rank)
            os.environ |= job.environment
            if job.world:
                _meet(rank, job.world, folder)
            _train(job, rank)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    return child


def _say_into(folder: Path, rank: int) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)


def _meet(rank: int, world: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", store, timedelta(minutes=3), rank=rank, world_size=world)


def _train(job: Job, rank: int) -> None:
    from logitcache.distill import run_training
    from logitcache.training.options import TrainOptions

    torch.set_num_threads(1)
    if job.shard:
        shard_on_cpu()
    if rank in job.kill:
        die_after(job.kill[rank])
    if job.command:
        from logitcache.cli.main import main

        sys.argv = ["logitcache", *job.command]
        main()
    run_training(TrainOptions.build(job.values | job.on_rank.get(rank, {})), job.resume)


def die_after(step: int) -> None:
    """Let this process kill itself at the end of an optimiser step, before anything is saved of it."""
    from logitcache import models
    from logitcache.training.records import RecordCallback

    if step == 0:
        models.save_model = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    RecordCallback.on_step_end = on_step_end  # type: ignore[method-assign]


def shard_on_cpu() -> None:
    from accelerate import DistributedType, PartialState

    plain = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


if __name__ == "__main__":
    # torchrun tests/train_ranks.py STEP train ...: the command line, whose rank 1 dies at the end of a step.
    from logitcache.cli.main import main

    at = int(sys.argv.pop(1))
    if os.environ["RANK"] == "1":
        die_after(at)
    main()
