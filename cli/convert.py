"""`logitcache convert`."""

from __future__ import annotations

from pathlib import Path

import click

from .console import debug_option, json_option, out, print_json
from .options import new_cache_option
from .progress import View

EXAMPLE = """
\b
Example:
  logitcache convert cache --out cache-arrow --container arrow

Nothing is decoded, so nothing changes but the kind of file. Run the same line again to resume after an interruption.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""


@click.command(epilog=EXAMPLE)
@click.argument("source", type=click.Path(), metavar="CACHE")
@new_cache_option
@click.option("--container", required=True, type=click.Choice(["zarr", "arrow"]), help="Kind of file to write.")
@json_option
@debug_option
def convert(source: str, root: Path, container: str, as_json: bool) -> None:
    """Copy a cache into another kind of file, without loss."""
    from logitcache.store import convert as convert_cache
    from logitcache.store import open_cache

    with View("convert") as view:

        def advance(done: int, total: int) -> None:
            view.bar(done, total, f"{done:,} of {total:,} units", None)

        manifest = convert_cache(source, root, container, advance)  # type: ignore[arg-type]
    before, after = open_cache(source).num_bytes, open_cache(root).num_bytes
    facts = {
        "cache": str(root),
        "container": container,
        "tokens": sum(shard.num_tokens for shard in manifest.shards),
        "bytes": after,
        "bytes before": before,
        "fingerprint": manifest.fingerprint,
    }
    if as_json:
        print_json(facts)
    else:
        out.print(f"{root}: {facts['tokens']:,} tokens in {after:,} bytes ({container}); {source} has {before:,}")
