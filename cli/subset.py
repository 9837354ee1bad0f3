"""`logitcache subset`."""

from __future__ import annotations

from pathlib import Path

import click

from .console import debug_option, json_option
from .options import new_cache_option
from .progress import StageView
from .results import print_result

EXAMPLE = """
\b
Example:
  logitcache subset cache --blocks 0:100,250,300: --out part
  logitcache subset cache --blocks @blocks.txt --out part

A range is FIRST:STOP with an exclusive stop, and either may be left out; a number is one block. Blocks come in the
order given; each may come once. Run the same line again to resume after an interruption.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""


@click.command(epilog=EXAMPLE)
@click.argument("source", type=click.Path(), metavar="CACHE")
@click.option("--blocks", required=True, metavar="RANGES", help="Ranges, or @FILE with one range a line.")
@new_cache_option
@json_option
@debug_option
def subset(source: str, blocks: str, root: Path, as_json: bool) -> None:
    """Make a cache of some blocks of another."""
    from logitcache.algebra import BlockRanges, subset_cache

    ranges = BlockRanges.parse(blocks)
    with StageView("subset") as view:
        result = subset_cache(source, root, ranges, view)
    print_result(result, as_json)
