"""`logitcache demo`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import debug_option, err, json_option, out, plain_table, print_json
from .options import NEW_PATH
from .progress import DumpView, TrainView

if TYPE_CHECKING:
    from logitcache.distill import StepProgress

EXAMPLE = """
\b
Example:
  logitcache demo --out demo-output

Run it again to resume. Exit status: 0 done, 1 failed, 2 wrong usage.
"""


@click.command(epilog=EXAMPLE, short_help="Distil a real teacher on real text: three students, a picture.")
@click.option("--out", "folder", default="demo-output", show_default=True, type=NEW_PATH, help="Where to write.")
@json_option
@debug_option
def demo(folder: Path, as_json: bool) -> None:
    """Distil a real teacher on real text: three students, one table, one picture."""
    from logitcache.demo import run_demo

    result = run_demo(folder, _Terminal())
    if as_json:
        print_json(result.rows)
        return
    names = ("trained on", "held-out CE", "KL", "ECE", "other CE", "B/token", "tokens/s")
    table = plain_table(names, left=names[:1])
    table.title, table.title_justify = "Same student, same tokens, same steps", "left"
    for row in result.rows:
        table.add_row(*_cells(row))
    out.print(table)
    out.print(
        "CE: held-out cross entropy; KL: from the teacher; ECE: calibration error; other CE: other text;\n"
        f"B/token: of the cache, all files. Nats per token, lower is better. Picture: {result.picture}",
        soft_wrap=True,
    )


def _cells(row: dict[str, Any]) -> list[str]:
    size = row["bytes_per_token"]
    return [
        row["run"],
        f"{row['held_out_ce']:.3f}",
        f"{row['kl']:.3f}",
        f"{row['ece']:.3f}",
        f"{row['other_ce']:.3f}",
        "-" if size is None else f"{size:.1f}",
        f"{row['tokens_per_second']:,.0f}",
    ]


class _Terminal:
    """The demo's view: bars, or lines where there is no terminal."""

    def say(self, text: str) -> None:
        err.print(f"demo: {text}", soft_wrap=True)

    @contextmanager
    def dumping(self, name: str) -> Iterator[DumpView]:
        with DumpView(name) as view:
            yield view

    @contextmanager
    def training(self, name: str) -> Iterator[StepProgress]:
        with TrainView(name) as view:
            view.stage("loading")
            yield view.step
