"""`logitcache plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .console import debug_option, json_option
from .options import (
    codec_option,
    container_option,
    run_options,
    server_of,
    server_options,
    teacher_options,
    trust_option,
    workers_option,
)
from .plan_table import show_plan

if TYPE_CHECKING:
    from logitcache.codec import LayoutName

EXAMPLE = """
\b
Example:
  logitcache plan --teacher ./SmolLM2-135M --corpus 'texts/*.txt' --select sample:25 --select top-k:64
  logitcache plan --teacher big --corpus web.parquet --select sample:25 --student student.yaml --machines 4

Dumps a small sample into a temporary folder, with the dump's own code, and extrapolates; docs/planning.md says how.
The same for one dump with all its arguments: logitcache dump ... --dry-run

Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""


# A plan understands whatever says how a dump runs, as a test compares; `dump --dry-run` takes the rest.
@click.command(epilog=EXAMPLE, short_help="Say what a dump would take and be worth, from a sample.")
@teacher_options
@run_options
@container_option
@workers_option
@server_options
@trust_option
@click.option("--select", required=True, multiple=True, metavar="SPEC", help="What to keep; may be repeated.")
@codec_option("both", "small", "fast")
@click.option("--sample-tokens", type=int, help="Tokens to try; default: 8,192 on a CPU, 65,536 on a GPU.")
@click.option("--student", metavar="CONFIG_OR_DIR", help="Also train this student a few steps: what would it read?")
@click.option("--machines", default=1, show_default=True, help="Machines like this one that share the dump.")
@json_option
@debug_option
def plan(
    select: tuple[str, ...],
    codec: str,
    sample_tokens: int | None,
    student: str | None,
    machines: int,
    as_json: bool,
    **rest: Any,
) -> None:
    """Say what a dump would take and be worth: bytes, hours, gradient error, students to break even."""
    from logitcache.selection import Selection

    selections = [Selection.parse(spec) for spec in select]
    from logitcache.dump import DumpOptions
    from logitcache.planning import PlanOptions, planned_outputs

    codecs: dict[str, tuple[LayoutName, ...]] = {"both": ("small", "fast"), "small": ("small",), "fast": ("fast",)}
    options = DumpOptions(outputs=planned_outputs(selections), codec=codecs[codec][0], server=server_of(rest), **rest)
    show_plan(
        PlanOptions(options, codecs[codec], sample_tokens=sample_tokens, student=student, machines=machines),
        "plan",
        as_json,
    )
