"""`logitcache verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from logitcache.errors import UsageError

from .console import counted, debug_option, json_option, out, plain_table, print_json, print_wide
from .options import device_map_option, trust_option
from .progress import StageView
from .results import left_out_line

if TYPE_CHECKING:
    from logitcache.audit import AuditReport, Figure

EXAMPLE = """
\b
Example:
  logitcache verify cache
  logitcache verify cache --against-teacher ./SmolLM2-135M --rows 1000

With --against-teacher random rows are computed again and compared, instead of checking every byte: the verdict is
`same teacher`, `other precision` or `different`. docs/audit.md explains the figures.

Exit status: 0 whole, or this teacher's in whatever precision; 1 damaged, no cache, or different; 2 wrong usage.
"""
WIDTH = 100
STYLES = {"same teacher": "green", "other precision": "yellow", "different": "red"}


@click.command(epilog=EXAMPLE, short_help="Check every byte of a cache, or compare it with a teacher.")
@click.argument("cache", type=click.Path())
@click.option("--against-teacher", "teacher", metavar="DIR_OR_ID", help="Compare random rows with this teacher.")
@click.option("--gguf-file", metavar="FILE", help="GGUF file inside the teacher's folder.")
@click.option("--tokenizer", metavar="DIR_OR_ID", help="The teacher's tokenizer, if it is not beside it.")
@click.option("--rows", type=int, metavar="N", help="Rows to compare.  [default: 1000]")
@click.option("--seed", type=int, help="Of the choice of rows.  [default: 0]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the teacher.  [default: auto, that of the dump]",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where the teacher runs.  [default: auto]")
@device_map_option
@click.option("--batch-tokens", type=int, help="Tokens in one forward pass.  [default: 4096]")
@trust_option
@json_option
@debug_option
def verify(cache: str, teacher: str | None, as_json: bool, **rest: Any) -> None:
    """Check every byte of a cache and list what is damaged; or compare its rows with a teacher."""
    given = {name: value for name, value in rest.items() if value is not None and value is not False}
    if teacher is None:
        if given:
            option = "--" + next(iter(given)).replace("_", "-")
            raise UsageError(f"{option} says how to compare with a teacher; name it with --against-teacher")
        check(cache, as_json)
    else:
        audit(cache, teacher, given, as_json)


def check(cache: str, as_json: bool) -> None:
    """Every byte."""
    from logitcache.store import verify as verify_cache

    report = verify_cache(cache)
    if as_json:
        print_json({"ok": report.ok, **asdict(report)})
    else:
        names = ("shard", "array", "chunk", "what is wrong")
        table = plain_table(names, left=names, fold=True)
        for problem in report.problems:
            chunk = "" if problem.chunk is None else str(problem.chunk)
            table.add_row(problem.shard, problem.array, chunk, problem.what, style="red")
        if report.problems:
            out.print(table)
        state = "whole" if report.ok else f"DAMAGED: {counted(len(report.problems), 'problem')}"
        finished = ", unfinished (run the same dump again to finish it)" if report.unfinished else ""
        checked = f"{counted(report.shards, 'shard')}, {report.tokens:,} tokens checked"
        out.print(f"{cache}: {state}; {checked}{finished}")
        if report.nonfinite is not None:
            out.print(left_out_line(report.nonfinite))
        if not report.ok and "://" not in cache:
            out.print("`logitcache repair` lists what must be computed again", soft_wrap=True)
    if not report.ok:
        raise click.exceptions.Exit(1)


def audit(cache: str, teacher: str, given: dict[str, Any], as_json: bool) -> None:
    """Random rows against a teacher."""
    from logitcache.audit import AuditOptions, audit_cache

    options = AuditOptions(teacher, **given)
    with StageView("verify") as view:
        report = audit_cache(cache, options, view)
    if as_json:
        print_json({"ok": report.ok, "verdict": report.verdict, "sentence": report.sentence, **asdict(report)})
    else:
        show_audit(report)
    if not report.ok:
        raise click.exceptions.Exit(1)


def show_audit(report: AuditReport) -> None:
    """A table of figures and the verdict."""
    names = ["figure", "of blocks", "rows", "mean", "median", "99 %", "band", "limit"]
    table = plain_table([*names, report.other_dtype] if report.other_dtype else names, left=names[:2])
    for figure in report.figures:
        table.add_row(*_cells(figure), style="" if figure.verdict == "same teacher" else STYLES[figure.verdict])
    print_wide(table, WIDTH)
    known = {
        "same": "the files of the dump",
        "other": "files other than those of the dump",
        "unknown": "files the cache knows nothing of",
    }
    dumped = f", dumped in {report.cache_dtype}" if report.cache_dtype else ""
    tokenizer = "the same tokenizer" if report.tokenizer == "same" else "a tokenizer that was not found"
    out.print(
        f"{report.rows:,} rows of {counted(report.blocks, 'block')}; {report.teacher} in {report.dtype}{dumped}, "
        f"{known[report.files]}, {tokenizer}",
        soft_wrap=True,
        style="dim",
    )
    out.print(
        Text(report.verdict, style=f"bold {STYLES[report.verdict]}") + Text(f": {report.sentence}"), soft_wrap=True
    )


def _cells(figure: Figure) -> list[str]:
    numbers = [figure.mean, figure.median, figure.p99, figure.band, figure.limit, figure.precision]
    shown = [f"{number:.1e}" for number in numbers if number is not None]
    return [figure.measure, figure.part, f"{figure.rows:,}", *shown]
