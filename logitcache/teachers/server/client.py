"""Requests to a server: several at once, no faster than asked, again after what passes, and never with the key shown.

A loop of its own thread does the waiting, so that an interrupt reaches the caller at once, whatever is under way.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import json
import random
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx2

from logitcache.errors import ModelError
from logitcache.teachers.server.options import KEY_VARIABLE, ServerOptions
from logitcache.teachers.server.pace import Pace

T = TypeVar("T")

CONNECT_SECONDS = 10.0
LONGEST_WAIT = 300.0
WORDS = 300
PASSING = (408, 425, 429, 500, 502, 503, 504)


class RefusedError(Exception):
    """The server understood, and says no: status and its own words. To be turned into a sentence by who asked."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"{status} {words}".strip())
        self.status = status


class FailingError(ModelError):
    """The server keeps answering with a status that usually passes."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Asks one server.

    Args:
        base: its URL.
        key: sent as a bearer token; None for none.
        options: how to ask.
    """

    def __init__(self, base: str, key: str | None, options: ServerOptions) -> None:
        self.base = base
        self._key, self._options = key, options
        self._pace = Pace(options.requests_per_second)
        self._places = asyncio.Semaphore(options.concurrency)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_turn, args=(self._loop,), name="logitcache-server", daemon=True).start()
        self._http = self._run(_open(key, options))
        # Whoever forgets a client hangs up with it.
        self._end = weakref.finalize(self, _hang_up, self._loop, self._http)
        self._end.atexit = False

    def get(self, url: str, attempts: int | None = None) -> Any:
        """The JSON document at a URL. Raises as `post_all`."""
        return self._run(self._ask("GET", url, None, attempts))

    def post_all(
        self,
        url: str,
        questions: Sequence[Any],
        read: Callable[[int, Any], T],
        attempts: int | None = None,
    ) -> list[T]:
        """Post several documents, and what `read(number, answer)` makes of each answer, in their order.

        Args:
            attempts: how often each is tried; by default as the options say.

        Raises:
            RefusedError: the server says no to one of them.
            ModelError: it cannot be reached, keeps failing, or wants another key.
        """
        return self._run(self._ask_all(url, questions, read, attempts))

    def close(self) -> None:
        """Hang up."""
        self._end()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _ask_all(
        self, url: str, questions: Sequence[Any], read: Callable[[int, Any], T], attempts: int | None
    ) -> list[T]:
        async def one(number: int, question: Any) -> T:
            return read(number, await self._ask("POST", url, question, attempts))

        tasks = [asyncio.ensure_future(one(number, question)) for number, question in enumerate(questions)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(self, method: str, url: str, question: Any, attempts: int | None) -> Any:
        attempts = attempts or self._options.attempts
        wait = self._options.backoff
        async with self._places:
            for left in reversed(range(attempts)):
                await self._pace.turn()
                told = None
                try:
                    response = await self._http.request(method, url, json=question)
                except httpx2.TransportError as error:
                    if not left:
                        raise self._unreachable(error) from None
                else:
                    if response.status_code not in PASSING:
                        return self._document(response)
                    if not left:
                        raise self._failing(response)
                    told = retry_after(response.headers.get("Retry-After"))
                # Not all at the same moment, where several workers ask one server.
                pause = wait * random.uniform(0.75, 1.25) if told is None else max(told, 0.0)
                await asyncio.sleep(min(LONGEST_WAIT, pause))
                wait *= 2
        raise AssertionError("there is at least one attempt")

    def _document(self, response: httpx2.Response) -> Any:
        """The JSON of an answer that says yes."""
        status = response.status_code
        if status in (401, 403):
            what = f"the key in {KEY_VARIABLE} is not accepted" if self._key else f"it wants a key in {KEY_VARIABLE}"
            raise ModelError(f"{self.base} answers {status}: {what}; set that variable to the server's key")
        if response.is_redirect:
            raise ModelError(f"{self.base} answers {status}, a redirect; give the address that it leads to")
        if not response.is_success:
            raise RefusedError(status, self._words(response))
        try:
            return response.json()
        except ValueError:
            raise RefusedError(status, "with something that is not JSON") from None

    def _unreachable(self, error: httpx2.TransportError) -> ModelError:
        if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
            return ModelError(
                f"{self.base} does not answer within {self._options.timeout:g} s; allow more with --request-timeout, "
                "or ask less at once with --concurrency"
            )
        return ModelError(
            f"{self.base} cannot be reached or breaks off ({type(error).__name__}); check the address and that the "
            "server runs"
        )

    def _failing(self, response: httpx2.Response) -> FailingError:
        said = f"{response.status_code} {self._words(response)}".strip()
        return FailingError(
            f"{self.base} keeps answering {said}; look at the server, or ask less with --concurrency or "
            "--requests-per-second",
            response.status_code,
        )

    def _words(self, response: httpx2.Response) -> str:
        """What the server says in its own words: one short line, without the key, should it repeat it."""
        try:
            said = message_of(response.json())
        except ValueError:
            said = response.text if response.headers.get("Content-Type", "").startswith("text/plain") else ""
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in said).split())
        if self._key:
            line = line.replace(self._key, "***")
        return f"({line[:WORDS]})" if line else ""


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _open(key: str | None, options: ServerOptions) -> httpx2.AsyncClient:
    most = options.concurrency
    return httpx2.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx2.Timeout(options.timeout, connect=min(CONNECT_SECONDS, options.timeout)),
        limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most),
        # A redirect would carry the key to who knows where.
        follow_redirects=False,
    )


def _hang_up(loop: asyncio.AbstractEventLoop, http: httpx2.AsyncClient) -> None:
    async def end() -> None:
        await http.aclose()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)


def message_of(document: Any) -> str:
    """The message in the error documents that servers have."""
    if isinstance(document, dict):
        for name in ("message", "error", "detail"):
            if document.get(name):
                return message_of(document[name])
    return document if isinstance(document, str) else json.dumps(document, ensure_ascii=False)


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3: seconds or a date); None without a usable one."""
    if not header:
        return None
    try:
        return float(header) if header.strip().isdigit() else _seconds_until(header)
    except (TypeError, ValueError):
        return None


def _seconds_until(date: str) -> float:
    then = email.utils.parsedate_to_datetime(date)
    return (then - datetime.datetime.now(datetime.UTC)).total_seconds()
