"""How a server is asked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from logitcache.errors import UsageError

KEY_VARIABLE = "LOGITCACHE_API_KEY"


@dataclass(frozen=True)
class ServerOptions:
    """How a teacher's server is asked.

    Args:
        model: name under which the server knows the model; None if it serves one only.
        concurrency: requests under way at once; a request is one block.
        requests_per_second: at most so many are begun; None for no limit.
        timeout: seconds that one request may take.
        attempts: how often a request is tried when the connection or the server fails.
        backoff: seconds before the second attempt; they double from one to the next.

    Raises:
        UsageError: a number that makes no sense.
    """

    model: str | None = None
    concurrency: int = 8
    requests_per_second: float | None = None
    timeout: float = 600.0
    attempts: int = 6
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= 1024:
            raise UsageError(f"concurrency is {self.concurrency}; it must lie between 1 and 1024")
        for name in ("requests_per_second", "timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name.replace('_', '-')} is {value}; it must be above 0")


def is_url(teacher: str) -> bool:
    """Whether a teacher is a server's address, not a folder or hub id."""
    return "://" in teacher


def checked_url(url: str) -> str:
    """The address without a slash at its end. Raises UsageError, without showing what may be a password."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known:
        raise UsageError("the teacher's address is no http:// or https:// URL; write it as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            f"the teacher's address holds more than host, port and path; write it as http://host:8000/v1 and put a "
            f"key into the environment variable {KEY_VARIABLE}"
        )
    return url.rstrip("/")


def key_from_environment() -> str | None:
    """The server's key, if one is set. Raises UsageError, without showing it, where it cannot be sent."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not all("!" <= letter <= "~" for letter in key):
        raise UsageError(f"the key in {KEY_VARIABLE} holds a space, a line's end or a letter that no header can carry")
    return key or None
