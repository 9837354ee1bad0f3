"""`logitcache export`."""

from __future__ import annotations

from pathlib import Path

import click

from logitcache.errors import UsageError

from .console import counted, debug_option, json_option, out, print_json
from .options import NEW_PATH
from .progress import View

EXAMPLE = """
\b
Example:
  logitcache export cache --to parquet --out exported
  logitcache export cache --to distillkit --layout budget --out captured
  logitcache export cache --to trl --blocks 0:100 --out pretokenised

\b
parquet     one row a position, for the Hub's viewer, SQL and pandas; nothing is lost; every selection
distillkit  what arcee-ai/DistillKit captures and trains from (teacher.kind: dataset); top-k caches
trl         pre-tokenised rows for TRL's SFTTrainer with the teacher's top-k beside them; top-k and top-p caches.
            No TRL trainer reads the teacher's columns by itself: they are for a subclass or a stand-in server

Columns and what is lost: docs/interchange.md. Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""


@click.command(epilog=EXAMPLE)
@click.argument("cache", type=click.Path())
@click.option("--to", "target", required=True, type=click.Choice(["parquet", "distillkit", "trl"]), help="For whom.")
@click.option("--out", "folder", required=True, type=NEW_PATH, metavar="FOLDER", help="New folder.")
@click.option("--blocks", metavar="FIRST:STOP", help="Only these blocks; either may be left out.")
@click.option(
    "--layout",
    metavar="NAME|FILE",
    help="distillkit: recommended (k=128), budget (k=50), or a YAML file of logprob_compressor fields; "
    "default: recommended at the cache's own k.",
)
@json_option
@debug_option
def export(cache: str, target: str, folder: Path, blocks: str | None, layout: str | None, as_json: bool) -> None:
    """Write a cache as Parquet files that other tools read."""
    from logitcache.store import open_cache

    opened = open_cache(cache)
    chosen = None if blocks is None else _one_range(blocks, opened.num_blocks)
    from logitcache.interchange import choose_layout, export_cache

    wanted = None if layout is None else choose_layout(layout, opened.vocab_size)
    with View("export") as view:

        def advance(done: int, total: int) -> None:
            view.bar(done, total, f"{done:,} of {total:,} tokens", None)

        report = export_cache(opened, target, folder, chosen, wanted, advance)
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "to": target,
                "files": report.files,
                "blocks": report.blocks,
                "tokens": report.tokens,
                "bytes": report.num_bytes,
                "bytes_per_token": report.num_bytes / report.tokens,
                "fingerprint": opened.fingerprint,
            }
        )
    else:
        size = f"{report.num_bytes / 1e6:,.2f} MB, {report.num_bytes / report.tokens:.1f} B/token"
        out.print(f"{folder}: {report.tokens:,} tokens in {counted(len(report.files), 'file')}, {size}")


def _one_range(text: str, num_blocks: int) -> tuple[int, int]:
    """First and stop of the blocks, which must be one range."""
    from logitcache.algebra import BlockRanges

    ranges = BlockRanges.parse(text)
    if len(ranges.ranges) != 1:
        raise UsageError(f"--blocks {text!r} is more than one range; export one, or make a cache of them with subset")
    blocks = ranges.blocks(num_blocks)
    return int(blocks[0]), int(blocks[-1]) + 1
