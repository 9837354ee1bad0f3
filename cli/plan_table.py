"""What `plan` and `dump --dry-run` print."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.table import Table

from .console import counted, out, plain_table, print_json, print_wide, writing_nothing
from .progress import StageView

if TYPE_CHECKING:
    from logitcache.planning import DumpPlan, PlannedCache, PlanOptions

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def show_plan(options: PlanOptions, command: str, as_json: bool) -> None:
    """Make the plan and print it, as a table or as JSON."""
    from logitcache.planning import make_plan

    with writing_nothing(), StageView(command) as view:
        plan = make_plan(options, view)
    if as_json:
        print_json(plan.to_dict())
    else:
        print_plan(plan)


def print_plan(plan: DumpPlan) -> None:
    """The corpus in a line, the caches in a table, and what one must know to read it."""
    corpus = plan.corpus
    about = f" (± {corpus.uncertainty:.1%})" if corpus.uncertainty else ""
    tried = "all" if corpus.whole else f"{corpus.sample_tokens:,}"
    out.print(
        f"{corpus.tokens:,} tokens{about} in {counted(corpus.files, 'file')}, {scaled(corpus.bytes)}; {tried} of them "
        f"tried on {plan.device}\n"
    )
    table, width = _table(plan)
    print_wide(table, width)
    out.print()
    if plan.together and len(plan.caches) > 1:
        out.print(f"One dump writes all of them: {scaled(plan.total_bytes)} in {time(plan.caches[0].hours)}.")
    for line in _legend(plan):
        out.print(line)
    for note in plan.notes:
        out.print(f"Note: {note}.", style="yellow")


def _table(plan: DumpPlan) -> tuple[Table, int]:
    """The table, and how many columns of the terminal it takes."""
    names = ["select", "codec", "B/token", "size", "±", "time", "tokens/s", "angle", "even"]
    names += ["reads"] if plan.student else []
    rows = [_cells(cache) for cache in plan.caches]
    table = plain_table(names, left=names[:2])
    last = ""
    for row in rows:
        shown = ["" if row[0] == last else row[0], *row[1:]]
        last = row[0]
        table.add_row(*shown[: len(names)])
    widths = [max(len(row[place]) for row in [names, *rows]) for place in range(len(names))]
    return table, sum(widths) + 2 * (len(names) - 1)


def _cells(cache: PlannedCache) -> list[str]:
    angle, even = cache.gradient_angle, cache.break_even_students
    reads = cache.reader_bytes_per_second
    return [
        cache.select,
        cache.codec,
        f"{cache.bytes_per_token:.1f}",
        scaled(cache.bytes),
        f"{cache.bytes_uncertainty:.1%}" if cache.bytes_uncertainty else "exact",
        time(cache.hours),
        f"{cache.tokens_per_second:,.0f}",
        "-" if angle is None else f"{angle:.1f}°",
        "never" if math.isinf(even) else f"{even:.1f}",
        "" if reads is None else f"{scaled(reads)}/s",
    ]


def _legend(plan: DumpPlan) -> list[str]:
    spread = [
        "±: of size, two standard errors: parts of the sample differ, and what tables counted from more rows will gain "
        "is only extrapolated. A larger sample narrows both."
    ]
    angle = [
        f"angle: between the LM head's gradient from such rows and full distillation's (0°: the same), on "
        f"{plan.gradient_positions} positions; of unbiased selections (sample, varopt) it shrinks with more of them."
    ]
    lines = [
        *(spread if any(cache.bytes_uncertainty for cache in plan.caches) else []),
        f"time: loading ({time(plan.loading_seconds / 3600)}), tokenising ({time(plan.tokenising_seconds / 3600)}) and "
        f"the dump at the measured speed"
        + (f", divided by {plan.speed_up}" if plan.speed_up > 1 else "")
        + "; tokens/s: of one worker.",
        *(angle if plan.gradient_positions else []),
        "even: from so many students on, each reading the cache once, a dump takes less time than running the teacher "
        "beside each of them.",
    ]
    if plan.student:
        gains = plan.caches[0].speed_up or {}
        shown = ", ".join(f"{students}: {gain:.2f}" for students, gain in gains.items())
        lines += [
            f"reads: bytes that the student needs of a disk; it learns from {plan.student.tokens_per_second:,.0f} "
            "tokens/s here.",
            f"Time with a live teacher over time with the first cache, its dump included, by students: {shown}.",
        ]
    return lines


def scaled(number: float) -> str:
    """Bytes with three digits or four: 812 B, 1.95 GB."""
    place = 0
    while number >= 999.5 and place + 1 < len(UNITS):
        number, place = number / 1000, place + 1
    digits = 0 if place == 0 or number >= 100 else 1 if number >= 10 else 2
    return f"{number:.{digits}f} {UNITS[place]}"


def time(hours: float) -> str:
    """Seconds, minutes, hours or days, whichever is readable."""
    seconds = hours * 3600
    scales = ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h"), (math.inf, 86_400, "d"))
    _, size, unit = next(scale for scale in scales if seconds < scale[0])
    amount = seconds / size
    return f"{amount:.{1 if amount < 10 else 0}f} {unit}"
