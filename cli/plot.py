"""`logitcache plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .console import counted, debug_option, json_option, out, print_json
from .options import NEW_PATH, rows_options
from .progress import StageView
from .tokens import token_text

EXAMPLE = """
\b
Example:
  logitcache plot cache --out cache.png
  logitcache plot cache --out pictures --sample 20

A name that ends in .png gets one picture of everything, any other is a folder for one picture each. They show what
`stats` counts; one that would be empty, as of the mass that draws keep, is left out, and the output says why.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""


@click.command(epilog=EXAMPLE, short_help="Draw what `stats` counts.")
@click.argument("cache", type=click.Path())
@click.option("--out", "path", required=True, type=NEW_PATH, metavar="FILE_OR_DIR", help="Where to.")
@rows_options
@json_option
@debug_option
def plot(cache: str, path: Path, tokenizer: str | None, as_json: bool, **rest: Any) -> None:
    """Draw what `stats` counts: mass, entropy, ids and bytes of a cache's rows."""
    from logitcache.stats import StatsOptions, check_picture, draw_stats, left_out_panels, measure_stats
    from logitcache.store import open_cache

    check_picture(path)
    options = StatsOptions(**rest)
    text = token_text(open_cache(cache, partial=True), tokenizer)
    with StageView("plot") as view:
        found = measure_stats(cache, options, text, view)
        view.stage("drawing")
        written = draw_stats(found, path)
    left_out = left_out_panels(found)
    if as_json:
        pictures = [str(picture) for picture in written]
        print_json({"cache": found.cache, "tokens": found.tokens, "pictures": pictures, "left_out": left_out})
        return
    out.print(f"{found.cache}: {counted(len(written), 'picture')} in {path}", soft_wrap=True)
    for name, why in left_out.items():
        out.print(f"without {name.replace('_', ' ')}: {why}", style="dim", soft_wrap=True)
