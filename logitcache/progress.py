"""What long operations report while they run; the command line draws it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told by everything that writes a cache."""

    def stage(self, what: str) -> None:
        """A new stage began, for example loading the teacher."""

    def advance(self, done: int, total: int, computed: int, num_bytes: int) -> None:
        """`done` of `total` tokens are finished, `computed` of them in this run; `num_bytes` of it are written."""

    def note(self, what: str) -> None:
        """Something worth saying once, for example that a worker died and was started again."""


class Silent:
    """Reports nothing."""

    def stage(self, what: str) -> None:
        pass

    def advance(self, done: int, total: int, computed: int, num_bytes: int) -> None:
        pass

    def note(self, what: str) -> None:
        pass
