"""How messages name an objective and its options: as Python code writes them, or as a command line does."""

from __future__ import annotations

from typing import Any


class Spelling:
    """Python's: `forward_kl`, `tail='bucket'`."""

    def kind(self, kind: str) -> str:
        """An objective."""
        return kind

    def name(self, option: str) -> str:
        """An option without a value."""
        return option

    def option(self, option: str, *values: Any) -> str:
        """An option with a value, or with each of several: `tail='unbiased' or 'bucket'`."""
        return f"{option}={' or '.join(map(repr, values))}"


class OptionSpelling(Spelling):
    """That of `logitcache train`: `--objective forward-kl`, `--tail bucket`."""

    def kind(self, kind: str) -> str:
        return f"--objective {kind.replace('_', '-')}"

    def name(self, option: str) -> str:
        return f"--{option.replace('_', '-')}"

    def option(self, option: str, *values: Any) -> str:
        return f"{self.name(option)} {' or '.join(map(str, values))}"


PYTHON = Spelling()
OPTIONS = OptionSpelling()
