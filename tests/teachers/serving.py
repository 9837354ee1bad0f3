"""A language model in a server process, for tests: see `lm_server`."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Serving:
    """A running server, which listens at two ports."""

    port: int
    other_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def other_url(self) -> str:
        return f"http://127.0.0.1:{self.other_port}/v1"

    def set(self, **fields: Any) -> dict[str, Any]:
        """Change how it behaves (`lm_server.Settings`); what it was asked before. `reset=True` first undoes all.

        `wait_asked=n` first waits for the n-th request since.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("POST", "/settings", json.dumps(fields))
        report: dict[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
        return report


@contextmanager
def serving(folder: Path) -> Iterator[Serving]:
    """The model in `folder`, behind HTTP."""
    command = [sys.executable, "-m", "tests.teachers.lm_server", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Serving(*map(int, process.stdout.readline().split()))
    finally:
        process.kill()
        process.wait()
