"""`logitcache verify`."""

from __future__ import annotations

from dataclasses import asdict

import click
from rich.table import Table

from .console import counted, debug_option, json_option, out, print_json

EXAMPLE = """
\b
Example:
  logitcache verify cache

Exit status: 0 whole, 1 damaged or no cache, 2 wrong usage.
"""


@click.command(epilog=EXAMPLE)
@click.argument("cache", type=click.Path())
@json_option
@debug_option
def verify(cache: str, as_json: bool) -> None:
    """Check every byte of a cache and list what is damaged."""
    from logitcache.store import verify as verify_cache

    report = verify_cache(cache)
    if as_json:
        print_json({"ok": report.ok, **asdict(report)})
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("shard", "array", "chunk", "what is wrong"):
            table.add_column(column, overflow="fold")
        for problem in report.problems:
            chunk = "" if problem.chunk is None else str(problem.chunk)
            table.add_row(problem.shard, problem.array, chunk, problem.what, style="red")
        if report.problems:
            out.print(table)
        state = "whole" if report.ok else f"DAMAGED: {counted(len(report.problems), 'problem')}"
        finished = ", unfinished (run the same dump again to finish it)" if report.unfinished else ""
        checked = f"{counted(report.shards, 'shard')}, {report.tokens:,} tokens checked"
        out.print(f"{cache}: {state}; {checked}{finished}")
    if not report.ok:
        raise click.exceptions.Exit(1)
