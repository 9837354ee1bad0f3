"""`logitcache repair`."""

from __future__ import annotations

from dataclasses import asdict

import click

from .console import counted, debug_option, json_option, out, plain_table, print_json

EXAMPLE = """
\b
Example:
  logitcache repair cache
  logitcache repair cache --apply

Exit status: 0 nothing is damaged, or it was taken back; 1 damaged or no cache, 2 wrong usage.
"""


@click.command(epilog=EXAMPLE, short_help="List a cache's damaged units, and have them computed again.")
@click.argument("cache", type=click.Path())
@click.option("--apply", is_flag=True, help="Take their commits back; refused while a run writes to the cache.")
@json_option
@debug_option
def repair(cache: str, apply: bool, as_json: bool) -> None:
    """List the units of a damaged cache that must be computed again, or make them pending.

    The command that made the cache, run again, then computes these units only. Damaged shards stay until the new ones
    take their place; what is left over is for `gc`.
    """
    from logitcache.store import repair as repair_cache

    found = repair_cache(cache, apply=apply)
    units = sorted({item.unit for item in found if item.unit is not None})
    if as_json:
        print_json({"cache": str(cache), "applied": apply, "units": units, "repairs": [asdict(item) for item in found]})
    elif not found:
        out.print(f"{cache}: nothing is damaged")
    else:
        table = plain_table(("unit", "file", "what is wrong"), left=("file", "what is wrong"), fold=True)
        for item in found:
            table.add_row("" if item.unit is None else str(item.unit), item.file, item.what)
        out.print(table)
        said = counted(len(units), "unit")
        if not units:
            done = "nothing was" if apply else "nothing is to be"
            after = "run the command that made the cache again to finish it" if apply else "--apply mends the files"
            out.print(f"{cache}: {done} taken back of what was computed; {after}")
        elif apply:
            out.print(f"{cache}: {said} taken back; run the command that made the cache again to compute them")
        else:
            out.print(f"{cache}: {said} to be computed again; --apply takes their commits back")
    if found and not apply:
        raise click.exceptions.Exit(1)
