"""`logitcache pull`."""

from __future__ import annotations

import click

from .console import debug_option, json_option
from .options import NewPath
from .transfer import transfer

EXAMPLE = """
\b
Example:
  logitcache pull s3://bucket/caches/prose cache

Reading needs no pull: `--cache s3://...` fetches what it reads. A copy is for commands that need a folder (merge,
convert, gc) and for machines without the object store. Run the same line again to go on after an interruption.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""


@click.command(epilog=EXAMPLE)
@click.argument("source", metavar="URL")
@click.argument("folder", type=NewPath())
@json_option
@debug_option
def pull(source: str, folder: str, as_json: bool) -> None:
    """Copy a cache from an object store to a folder."""
    from logitcache.store import pull as pull_cache

    transfer("pull", pull_cache, source, folder, as_json)
