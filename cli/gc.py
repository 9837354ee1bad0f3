"""`logitcache gc`."""

from __future__ import annotations

from dataclasses import asdict

import click

from .console import counted, debug_option, json_option, out, plain_table, print_json

EXAMPLE = """
\b
Example:
  logitcache gc cache
  logitcache gc cache --delete

Exit status: 0 done, 1 failed or no cache, 2 wrong usage.
"""


@click.command(epilog=EXAMPLE, short_help="List or remove what killed runs left in a cache.")
@click.argument("cache", type=click.Path())
@click.option("--delete", is_flag=True, help="Remove the files; refused while a run writes to the cache.")
@json_option
@debug_option
def gc(cache: str, delete: bool, as_json: bool) -> None:
    """List files that killed runs left in a cache and that nothing names, or remove them."""
    from logitcache.store import collect_garbage

    found = collect_garbage(cache, delete=delete)
    num_bytes = sum(leftover.num_bytes for leftover in found)
    if as_json:
        files = [asdict(leftover) for leftover in found]
        print_json({"cache": str(cache), "deleted": delete, "files": files, "num_bytes": num_bytes})
        return
    table = plain_table(("file", "bytes", "what"), left=("file", "what"), fold=True)
    for leftover in found:
        table.add_row(leftover.file, f"{leftover.num_bytes:,}", leftover.what)
    if found:
        out.print(table)
    after = "removed" if delete else "left over; --delete removes them" if found else "left over"
    out.print(f"{cache}: {counted(len(found), 'file')} of {counted(num_bytes, 'byte')} {after}")
