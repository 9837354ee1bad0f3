"""`--engine ray`: workers as Ray actors, wherever there is room. Ray restarts what dies; commits are the truth."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from logitcache.dump_checks import refuse_early
from logitcache.dump_job import DumpReport
from logitcache.dump_options import DumpOptions
from logitcache.engines.devices import take_device
from logitcache.engines.watch import Watcher
from logitcache.engines.worker import run_worker, sweep
from logitcache.errors import LogitcacheError, UsageError, counted
from logitcache.progress import Progress, Silent

_VIEW_SECONDS = 0.5
# What the other workers may take to find that nothing is left.
_ENDING_SECONDS = 3.0


def run_ray(options: DumpOptions, progress: Progress) -> DumpReport:
    """Run `options.workers` actors, or one for each GPU or else each node, until every unit is committed.

    Joins the cluster that RAY_ADDRESS names or that runs on this machine; where there is none, Ray starts one of this
    machine alone. Every node must see cache, corpus and teacher under the same paths.

    Raises:
        UsageError: Ray is not installed, or cannot be reached.
        Others: as `run_dump`.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError('the engine ray needs Ray; run: pip install "logitcache[ray]"')
    refuse_early(options)
    import ray

    joined_before = ray.is_initialized()
    if not joined_before:
        progress.stage("joining the Ray cluster")
        # Nothing is told to anybody outside unless the user asked for it.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"Ray cannot be reached or started ({str(error).splitlines()[0]}); check RAY_ADDRESS and ray status"
            ) from error
    try:
        return _run(ray, options, progress)
    finally:
        if not joined_before:
            ray.shutdown()


def _run(ray: Any, options: DumpOptions, progress: Progress) -> DumpReport:
    watcher = Watcher([output.location for output in options.outputs], options.lease_seconds, progress)
    before = watcher.done_tokens()
    resources, count = _resources(ray, options)
    progress.stage(f"placing {counted(count, 'worker')} on the Ray cluster")
    # A node that is lost takes its actor along; Ray starts it anew elsewhere and calls `run` again.
    actor = ray.remote(max_restarts=-1, max_task_retries=-1, **resources)(Worker)
    actors = [actor.remote(options, rank, os.getcwd()) for rank in range(count)]
    try:
        running = [worker.run.remote() for worker in actors]
        while True:
            ended, running = ray.wait(running, num_returns=1, timeout=_VIEW_SECONDS)
            for result in ray.get(ended):
                if isinstance(result, LogitcacheError):
                    raise result
                # Who is through saw every unit committed; others may be lost, or waiting for room.
                if running:
                    ray.wait(running, num_returns=len(running), timeout=_ENDING_SECONDS)
                return replace(result, computed_tokens=result.tokens - before)
            watcher.show()
    finally:
        for worker in actors:
            ray.kill(worker)
        sweep(options)


def _resources(ray: Any, options: DumpOptions) -> tuple[dict[str, float], int]:
    """What each actor asks for, and how many there are: a GPU each, or else a share of the processors."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus and options.device != "cpu":
        return {"num_gpus": 1, "num_cpus": 1}, options.workers or gpus
    count = options.workers or len(nodes)
    on_a_node = -(-count // len(nodes))
    smallest = min((int(node.get("CPU", 0)) for node in nodes), default=1)
    return {"num_cpus": max(1, smallest // on_a_node)}, count


class Worker:
    """What an actor is: one worker of a dump, with a teacher of its own. Ray may start it again at any time."""

    def __init__(self, options: DumpOptions, rank: int, folder: str) -> None:
        self._options, self._rank, self._folder = options, rank, folder

    def run(self) -> DumpReport | LogitcacheError:
        """Work until every unit is committed. What the user must mend comes back as a value, to be raised as it is."""
        try:
            if Path(self._folder).is_dir():
                os.chdir(self._folder)
            # Ray shows an actor no GPUs but its own, and gives it as many threads as processors.
            take_device(self._options.device, 0)
            return run_worker(self._options, _Log(), label=str(self._rank))
        except LogitcacheError as error:
            return error


class _Log(Silent):
    """Ray brings what an actor writes to the terminal of the dump."""

    def note(self, what: str) -> None:
        sys.stderr.write(f"dump: {what}\n")
