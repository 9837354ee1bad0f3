"""What all commands share: consoles, JSON output, and turning exceptions into one sentence and an exit status."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console, RenderableType
from rich.table import Table

from logitcache.errors import LogitcacheError
from logitcache.errors import counted as counted

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
if not out.is_terminal and "COLUMNS" not in os.environ:
    # Who reads a pipe or a file wants paths and hashes in one piece.
    out.width = 10_000
KEPT = "what is committed is kept, and the same command goes on from there"
NOTHING = "nothing was written"
# What to say of a command that was stopped; of others, that nothing was written.
AFTER_STOP = {
    **dict.fromkeys(("dump", "derive", "merge", "subset", "convert", "import", "push", "pull", "bench", "demo"), KEPT),
    "train": "what is saved is kept, and the same command with --resume goes on from there",
    "export": "nothing is kept; the same command begins anew",
    **dict.fromkeys(("plot", "gc", "repair"), "run the same command again"),
}


def is_main() -> bool:
    """Whether this process is the only one, or the first of those that a launcher started."""
    return not _launched() or os.environ.get("RANK", "0") == "0"


def _launched() -> bool:
    """Whether a launcher such as torchrun started this process."""
    return os.environ.get("LOCAL_RANK", "") not in ("", "-1")


class Terminated(BaseException):
    """SIGTERM arrived."""


class Commands(click.Group):
    """A group whose commands say what is left when they are stopped."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click does; a note of what to do next goes with KeyboardInterrupt and Terminated."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Terminated) as error:
            if not hasattr(error, "__notes__"):
                error.add_note(AFTER_STOP.get(str(ctx.invoked_subcommand), NOTHING))
            raise


@contextmanager
def writing_nothing() -> Iterator[None]:
    """For a part of a command that leaves nothing when it is stopped, where the rest of the command does."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as error:
        error.add_note(NOTHING)
        raise


def debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--debug` to a command."""

    def remember(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
        if value:
            os.environ["LOGITCACHE_DEBUG"] = "1"

    return click.option(
        "--debug", is_flag=True, expose_value=False, callback=remember, help="Show a traceback when something fails."
    )(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json` to a command that prints facts."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output instead.")(command)


def plain_table(names: Iterable[str], left: Collection[str] = (), fold: bool = False) -> Table:
    """A table without borders, of numbers but for the columns `left`.

    With `fold` cells that are too long for the terminal go on in the next line; without, a cell is one line.
    """
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(
            name,
            justify="left" if name in left else "right",
            overflow="fold" if fold else "ellipsis",
            no_wrap=not fold,
        )
    return table


def print_wide(renderable: RenderableType, width: int) -> None:
    """Print something that needs `width` columns: a narrower terminal folds its lines, nothing is cut."""
    narrow = out.width
    out.width = max(width, narrow)
    try:
        out.print(renderable, crop=False, soft_wrap=True)
    finally:
        out.width = narrow


def print_json(value: Any) -> None:
    """One JSON document on standard output; NaN becomes null."""
    click.echo(json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False))


def run(command: Callable[[], Any]) -> NoReturn:
    """Run a click command and leave with the right exit status: 0, 1, 2, 130 or 143."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        # Outside its standalone mode click returns the status of `Exit` instead of raising it.
        result = command()
        sys.stdout.flush()
        status = result if isinstance(result, int) else 0
    except (Exception, KeyboardInterrupt, Terminated) as error:
        if _launched():
            # The launcher ends all processes as soon as one has ended; what this one has to say comes first.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        status = _explain(error)
    if status in (130, 143) or (status and _launched()):
        # Threads of libraries, or processes that are gone, must not keep a stopped process alive.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def _explain(error: BaseException) -> int:
    if os.environ.get("LOGITCACHE_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.ClickException):
        if is_main():
            error.show()
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | click.Abort):
        if is_main():
            _say(f"interrupted; {_next(error)}")
        return 130
    if isinstance(error, Terminated):
        if is_main():
            _say(f"stopped by SIGTERM; {_next(error)}")
        return 143
    if getattr(error, "said_elsewhere", False):
        return getattr(error, "exit_code", 1)
    if isinstance(error, LogitcacheError):
        _say(f"error: {error}")
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        # Nobody reads any more; Python would complain again when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError):
        _say(f"error: {error.filename or 'a file'} cannot be used: {error.strerror or error}")
        return 1
    if isinstance(error, MemoryError):
        _say("error: out of memory; use a smaller --batch-tokens")
        return 1
    _say(f"error: unexpected {type(error).__name__}: {error}; run again with --debug and report it")
    return 1


def _next(stopped: BaseException) -> str:
    """What was noted of how to go on. click puts an `Abort` in the place of KeyboardInterrupt."""
    return next(iter(getattr(stopped.__cause__ or stopped, "__notes__", [])), NOTHING)


def _say(message: str) -> None:
    click.echo(message, err=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
