"""A thread beside the teacher's: what one batch of rows still needs is done while the next is computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class Pipeline:
    """Runs work in the order it is given, at most one piece behind its giver; use as a context manager.

    One piece at a time bounds the memory, and what a piece changes may be looked at once it is drained. Leaving waits
    for the piece under way, also after an error or Ctrl-C: a commit that was begun ends. What that piece raises is then
    lost to what was raised first.

    Attributes:
        busy: seconds that the work took.
        waited: seconds that the giver waited for it; all else was hidden behind what the giver did.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "encode")
        self._under_way: tuple[Future[int], Callable[[int], None]] | None = None
        self.busy = self.waited = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            self._executor.shutdown()

    def submit(self, work: Callable[[], int], done: Callable[[int], None]) -> None:
        """Begin `work` once what was given before is done; `done` is told its result, in the giver's thread.

        Raises: what the work before raised.
        """
        self.drain()
        self._under_way = self._executor.submit(self._timed, work), done

    def check(self) -> None:
        """Raise what the work raised, without waiting for it."""
        if self._under_way is not None and self._under_way[0].done():
            self.drain()

    def drain(self) -> bool:
        """Wait until nothing is under way; whether anything was. Raises what it raised."""
        if self._under_way is None:
            return False
        (future, done), self._under_way = self._under_way, None
        began = time.perf_counter()
        try:
            result = future.result()
        finally:
            self.waited += time.perf_counter() - began
        done(result)
        return True

    def _timed(self, work: Callable[[], int]) -> int:
        began = time.perf_counter()
        try:
            return work()
        finally:
            self.busy += time.perf_counter() - began
