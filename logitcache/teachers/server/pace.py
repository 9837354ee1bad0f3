"""A rate limit for the requests of one loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


class Pace:
    """Hands out turns, evenly spaced.

    Args:
        per_second: turns a second; None for as many as are wanted.
        clock, sleep: seconds now, and how to wait for some.
    """

    def __init__(
        self,
        per_second: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._gap = 0.0 if per_second is None else 1 / per_second
        self._clock, self._sleep = clock, sleep
        self._next = float("-inf")

    async def turn(self) -> None:
        """Wait for a turn. Turns that nobody took are not kept for later."""
        now = self._clock()
        mine = max(now, self._next)
        self._next = mine + self._gap
        if mine > now:
            await self._sleep(mine - now)
