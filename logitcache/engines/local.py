"""`--engine local --workers N`: N processes of this machine, each with a teacher; this one watches over them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from types import FrameType
from typing import Any

from logitcache.dump_checks import refuse_early
from logitcache.dump_job import DumpReport
from logitcache.dump_options import DumpOptions
from logitcache.engines.devices import take_device
from logitcache.engines.leases import remove_leases_of_dead
from logitcache.engines.watch import Watcher
from logitcache.engines.worker import run_worker, sweep
from logitcache.errors import CacheError, counted
from logitcache.progress import Progress, Silent
from logitcache.store import Layout

_VIEW_SECONDS = 0.5
# What a worker may take to end by itself: it finishes one forward of the teacher first.
_ENDING_SECONDS = 10.0
# A worker that dies so often before any unit is committed will not do better the next time.
_MOST_DEATHS = 3


def run_local(options: DumpOptions, progress: Progress, context: BaseContext | None = None) -> DumpReport:
    """Run `options.workers` processes until every unit is committed; `context` starts them, by default by spawning.

    Raises:
        CacheError: every worker died again and again.
        Others: as `run_dump`.
    """
    refuse_early(options)
    fleet = Fleet(options, progress, context or multiprocessing.get_context("spawn"))
    try:
        return fleet.run()
    finally:
        fleet.stop()


class Fleet:
    """The processes of one dump. What they did is in the cache; they tell only how they ended, and what to say once."""

    def __init__(self, options: DumpOptions, progress: Progress, context: BaseContext) -> None:
        self._options, self._progress, self._context = options, progress, context
        self._count = count = options.workers or 1
        self._place = options.outputs[0].location
        self._watcher = Watcher([output.location for output in options.outputs], options.lease_seconds, progress)
        self._processes: dict[int, Any] = {}
        self._pipes: dict[int, Connection] = {}
        self._deaths = dict.fromkeys(range(count), 0)
        self._committed = 0
        self._said: set[str] = set()

    def run(self) -> DumpReport:
        """Start them all, restart those that die, return what the first to finish reports."""
        self._progress.stage(f"starting {counted(self._count, 'worker')}")
        before = self._watcher.done_tokens()
        for slot in range(self._count):
            self._start(slot)
        while True:
            wait([*self._pipes.values()], timeout=_VIEW_SECONDS)
            for slot in list(self._pipes):
                report = self._hear(slot)
                if report is not None:
                    self._end(grace=_ENDING_SECONDS)
                    sweep(self._options)
                    return replace(report, computed_tokens=report.tokens - before)
            self._watcher.show()
            if not self._processes:
                raise CacheError(
                    f"every worker of {self._place} died again and again, as when memory runs out; use fewer "
                    "--workers or a smaller --batch-tokens and run the same command again, it resumes"
                )

    def stop(self) -> None:
        """End what still runs, at once but in order: its units stay free for others."""
        for process in self._processes.values():
            process.terminate()
        self._end(grace=_ENDING_SECONDS)

    def _end(self, grace: float) -> None:
        deadline = time.monotonic() + grace
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            # One that was stopped, or hangs in a driver or a slow disk: what it has not committed is nobody's loss.
            process.kill()
            process.join()
        # Also of workers that a signal met while they gave theirs back.
        remove_leases_of_dead(Layout(self._options.outputs[0].root).leases)
        for pipe in self._pipes.values():
            pipe.close()
        self._processes, self._pipes = {}, {}

    def _start(self, slot: int) -> None:
        mine, theirs = self._context.Pipe(duplex=False)
        arguments = (self._options, slot, self._count, theirs)
        process: Any = self._context.Process(  # type: ignore[attr-defined]
            target=_main, args=arguments, name=f"worker {slot}", daemon=True
        )
        # A new process inherits what is blocked: Ctrl-C must not meet it while it imports.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._processes[slot], self._pipes[slot] = process, mine

    def _hear(self, slot: int) -> DumpReport | None:
        """Take what a worker says; its report when it is through. Raises its error."""
        pipe = self._pipes[slot]
        try:
            while pipe.poll():
                kind, value = pipe.recv()
                if kind == "failed":
                    raise value
                if kind == "finished":
                    report: DumpReport = value
                    return report
                self._say(value)
        except (EOFError, ConnectionError):
            self._bury(slot)
        return None

    def _bury(self, slot: int) -> None:
        """A worker is gone without a word: start it again, unless that was tried often enough."""
        self._pipes.pop(slot).close()
        process = self._processes.pop(slot)
        process.join()
        committed = self._watcher.committed_units()
        if committed > self._committed:
            self._deaths = dict.fromkeys(self._deaths, 0)
        self._committed = committed
        self._deaths[slot] += 1
        how = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit status {process.exitcode}"
        if self._deaths[slot] < _MOST_DEATHS:
            self._progress.note(f"worker {slot} died ({how}) and is started again; its unit is computed again")
            self._start(slot)
        else:
            self._progress.note(f"worker {slot} died {_MOST_DEATHS} times ({how}); the others go on without it")

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._progress.note(what)


class _Relay(Silent):
    """What a worker has to say goes to the process that watches over it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def note(self, what: str) -> None:
        self._pipe.send(("note", what))


def _main(options: DumpOptions, slot: int, count: int, pipe: Connection) -> None:
    """What a worker process runs."""
    # Ctrl-C reaches the whole group of processes; the parent ends the workers then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _answer(pipe, lambda: _work(options, slot, count, pipe))


def _work(options: DumpOptions, slot: int, count: int, pipe: Connection) -> DumpReport:
    take_device(options.device, slot, count)
    return run_worker(options, _Relay(pipe), label=str(slot))


def _answer(pipe: Connection, work: Callable[[], DumpReport]) -> None:
    said: tuple[str, Any]
    try:
        said = "finished", work()
    except Exception as error:
        said = "failed", _portable(error)
    # From here on it ends by itself, and libraries that do so are not to be interrupted.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe.send(said)


def _portable(error: Exception) -> Exception:
    """An error as it can be sent to another process: itself, or what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _leave(_signal: int, _frame: FrameType | None) -> None:
    # Once: where a whole group of processes is told to end, the parent tells its workers again.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
