"""Running the console script's `main` inside this process, with its real exit status and streams."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from logitcache.cli import main as cli_main
from logitcache.cli.console import err, out


@dataclass(frozen=True)
class Ran:
    """Exit status and what was printed."""

    status: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """What was said about the failure: one line on stderr, no traceback, nothing on stdout."""
        assert self.out == ""
        assert "Traceback" not in self.err
        assert "error: unexpected" not in self.err
        *before, said = self.err.strip().splitlines()
        # Only stages of the work may stand before it.
        commands = ("dump", "train", "derive", "merge", "subset", "export", "import", "push", "pull")
        stages = tuple(f"{name}: " for name in (*commands, "verify", "stats", "plot"))
        assert all(line.startswith((*stages, "Usage:", "Try ")) or not line for line in before), before
        assert said.lower().startswith("error: ")
        return said


Main = Callable[..., Ran]


@pytest.fixture
def logitcache(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Main]:
    """Call as logitcache("verify", folder, ...)."""
    # Set, not deleted: so that what --debug sets is taken back after the test.
    monkeypatch.setenv("LOGITCACHE_DEBUG", "")
    for console in (out, err):
        monkeypatch.setattr(console, "_width", 400)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: Any) -> Ran:
        monkeypatch.setattr(sys, "argv", ["logitcache", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli_main.main()
        return Ran(int(caught.value.code or 0), *capfd.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)
