"""A number of tokens, or `auto`."""

from __future__ import annotations

from typing import Any

import click


class BatchTokens(click.ParamType):
    """Of `--batch-tokens`."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number of tokens nor auto", param, ctx)
