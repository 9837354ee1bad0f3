"""`logitcache merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .console import counted, debug_option, json_option, out
from .options import new_cache_option
from .progress import StageView
from .results import print_result

EXAMPLE = """
\b
Example:
  logitcache merge worker1 worker2 worker3 --out cache
  logitcache merge prose code --out both

Caches of one plan, finished or not (for example of several workers): their units are put together, hashes checked,
files hard-linked where the file system can (units of runs begun apart are packed anew). While units are missing the
result is an unfinished cache: merge the others into it later, or let `dump` finish it. Of a unit that differs, the
first one given is taken, and counted.

Finished caches of different corpora with the same teacher, tokenizer, vocabulary, selection and block length: their
blocks one after another, no value changed. Run the same line again to resume after an interruption.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""


@click.command(epilog=EXAMPLE, short_help="Put shards of several runs, or of several corpora, together.")
@click.argument("sources", nargs=-1, required=True, type=click.Path(), metavar="CACHE...")
@new_cache_option
@json_option
@debug_option
def merge(sources: tuple[str, ...], root: Path, as_json: bool) -> None:
    """Put shards of several runs, or caches of several corpora, together."""
    from logitcache.algebra import merge_caches

    with StageView("merge") as view:
        result = merge_caches(sources, root, view)
    print_result(result, as_json)
    if not as_json:
        _print_notes(result.notes)


def _print_notes(notes: dict[str, Any]) -> None:
    if conflicts := notes.get("conflicting_units"):
        units = counted(len(conflicts), "unit differs", "units differ")
        out.print(f"{units} between the caches; of each the first one given was taken.")
    if missing := notes.get("missing_units"):
        units = counted(len(missing), "unit is", "units are")
        out.print(f"{units} missing; merge the caches that hold what is missing, or let the dump finish this one.")
