"""`logitcache bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import debug_option, json_option, out, plain_table, print_json, print_wide
from .options import NEW_PATH, choice, teacher_options
from .progress import DumpView

if TYPE_CHECKING:
    from logitcache.bench import Measurement

EXAMPLE = """
\b
Example:
  logitcache bench storage --teacher ./SmolLM2-135M --corpus 'texts/*.txt' --dtype bfloat16 --out bench

The caches stay in the --out folder, where running the same line again finds them.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""
WIDTH = 116


@click.group(epilog=EXAMPLE, short_help="Measure what caches of your teacher and text cost and are worth.")
def bench() -> None:
    """Measure what caches of your own teacher and text would cost and be worth."""


@bench.command(epilog=EXAMPLE)
@teacher_options
@click.option("--out", "root", required=True, type=NEW_PATH, metavar="DIR", help="Folder for caches.")
@click.option("--select", multiple=True, metavar="SPEC", help="What to keep; may be repeated. Default: a wide choice.")
@click.option("--max-tokens", default=204_800, show_default=True, help="Size of each cache.")
@click.option("--block-length", default=512, show_default=True, help="Tokens in a block.")
@click.option(
    "--positions", default=1024, show_default=True, help="Positions whose gradient is measured (about 1 MB each)."
)
@choice(
    "--dtype",
    "auto",
    "float32",
    "bfloat16",
    "float16",
    help="Of the teacher that dumps; errors are measured in float32.",
)
@choice("--device", "auto", "cpu", "cuda", help="Where.")
@json_option
@debug_option
def storage(root: Path, select: tuple[str, ...], as_json: bool, **rest: Any) -> None:
    """Bytes a token, speed and gradient error of every selection, codec, container and of other tools' layouts.

    Writes a picture, bytes against gradient error, to storage.png in the --out folder.
    """
    from logitcache.bench import NOTE, SELECTIONS, StorageOptions, draw_storage, measure_storage

    options = StorageOptions(selections=select or SELECTIONS, folder=root, **rest)
    with DumpView("bench") as view:
        lines = measure_storage(options, view)
    picture = root / "storage.png"
    draw_storage(lines, picture)
    if as_json:
        print_json({"picture": str(picture), "measurements": [asdict(line) for line in lines]})
        return
    _print_table(lines)
    out.print(f"{NOTE} Picture: {picture}", soft_wrap=True)


def _print_table(lines: list[Measurement]) -> None:
    from logitcache.bench import COLUMNS, cells

    table = plain_table(COLUMNS, left=COLUMNS[:2])
    last = ""
    for line in lines:
        table.add_row("" if line.selection == last else line.selection, *cells(line))
        last = line.selection
    print_wide(table, WIDTH)
