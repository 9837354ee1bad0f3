"""One exception tree. Every message is one sentence: what is wrong, where, and what to do next."""

from __future__ import annotations

import textwrap
from typing import Any


def reason_of(error: Exception) -> str:
    """What an exception of another library says, short enough for a sentence of ours, and without the full stop."""
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...").rstrip(".")


def counted(number: int, one: str, many: str = "") -> str:
    """How a message counts: `1 shard`, `7 shards`, `1,234 entries`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


class LogitcacheError(Exception):
    """Base of every error a user can cause or meet; the command line prints it without a traceback."""

    exit_code = 1
    # True on the ranks of a distributed run whose main rank raises the same.
    said_elsewhere = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Some take more than a message; a worker's error must reach the process that started it all the same.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[LogitcacheError], arguments: tuple[Any, ...], fields: dict[str, Any]) -> LogitcacheError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(fields)
    return error


class UsageError(LogitcacheError, ValueError):
    """Arguments that cannot be right, alone, together, for the teacher they name or as a place (exit status 2).

    What the world refuses, files, damage, space and servers, is any of the others (exit status 1).
    """

    exit_code = 2


class CorpusError(LogitcacheError):
    """A corpus file is missing, unreadable, undecodable or empty."""


class EmptyCorpusError(CorpusError):
    """A corpus can be read and holds no text, or nothing of it is to be learnt."""


class ModelError(LogitcacheError):
    """A teacher, student or tokenizer cannot be loaded or used."""


class TargetsError(LogitcacheError, ValueError):
    """Sparse targets break an invariant; the message names the row."""


class ObjectiveError(LogitcacheError, ValueError):
    """An objective has no correct meaning for these targets; the message says what to store instead."""


class CacheError(LogitcacheError):
    """A cache folder is missing, is not a cache, or cannot be used as asked."""


class DamagedCacheError(CacheError):
    """Stored bytes differ from what was committed. `shard`, `array` and `chunk` locate the damage."""

    def __init__(self, message: str, *, shard: str = "", array: str = "", chunk: int | None = None) -> None:
        super().__init__(message)
        self.shard, self.array, self.chunk = shard, array, chunk


class FormatVersionError(CacheError):
    """The cache was written by a newer logitcache."""


class PlanMismatchError(CacheError):
    """A dump was started again with other arguments. `differences` holds (field, stored, given)."""

    def __init__(self, message: str, differences: list[tuple[str, object, object]]) -> None:
        super().__init__(message)
        self.differences = differences


class RemoteError(LogitcacheError):
    """An object store cannot be reached, or refuses; the message names the object and the endpoint."""


class InterchangeError(LogitcacheError):
    """A file of another tool cannot be read or written as asked."""


class TrainingError(LogitcacheError):
    """A training run cannot start or resume."""
