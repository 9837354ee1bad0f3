"""`logitcache stats`."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from .console import counted, debug_option, json_option, out, plain_table, print_json, print_wide
from .options import rows_options
from .progress import StageView
from .tokens import token_text

if TYPE_CHECKING:
    from logitcache.stats import CacheStats, Summary

EXAMPLE = """
\b
Example:
  logitcache stats cache
  logitcache stats cache --blocks 0:1000
  logitcache stats s3://bucket/caches/prose --sample 20

All rows are read, chunk by chunk, and the numbers are exact; --sample reads so many chunks, chosen at random. Of an
unfinished cache what is committed is read.

Exit status: 0 done, 1 damaged or no cache, 2 wrong usage, 130 or 143 interrupted.
"""
SHOWN_IDS = 10
WIDTH = 90


@click.command(epilog=EXAMPLE, short_help="Count mass, entropy, ids and bytes of a cache's rows.")
@click.argument("cache", type=click.Path())
@rows_options
@json_option
@debug_option
def stats(cache: str, tokenizer: str | None, as_json: bool, **rest: Any) -> None:
    """Tail mass, entropy, ids and bytes of a cache's rows, and what its teacher was sure of."""
    from logitcache.stats import StatsOptions, measure_stats
    from logitcache.store import open_cache

    options = StatsOptions(**rest)
    text = token_text(open_cache(cache, partial=True), tokenizer)
    with StageView("stats") as view:
        found = measure_stats(cache, options, text, view)
    if as_json:
        print_json(facts_of(found))
    else:
        show(found)


def facts_of(found: CacheStats) -> dict[str, Any]:
    """All that was found, ready for JSON."""
    plain = {field.name: getattr(found, field.name) for field in fields(found) if field.name != "columns"}
    plain |= {"cross_entropy": found.cross_entropy, "perplexity": found.perplexity}
    for name in ("ids", "kept_mass", "entropy", "surprise"):
        plain[name] = None if plain[name] is None else asdict(plain[name])
    for name in ("places", "top_ids"):
        plain[name] = [asdict(item) for item in plain[name]]
    return plain


def show(found: CacheStats) -> None:
    """Tables."""
    looked = f"{found.tokens:,} tokens"
    if found.tokens < found.cache_tokens:
        looked += f" of {found.cache_tokens:,}, {counted(found.chunks, 'chunk')} of {found.cache_chunks:,}"
    looked += f", {found.rows:,} of them count" if found.rows < found.tokens else ""
    unfinished = "" if found.complete else ", unfinished"
    out.print(Text(f"{found.cache}: {found.selection}, {looked}{unfinished}", style="bold"), soft_wrap=True)
    names = ("of a row", "mean", "1 %", "10 %", "median", "90 %", "99 %", "least", "most")
    table = plain_table(names, left=names[:1])
    _add(table, "ids", found.ids, 1)
    _add(table, "mass kept", found.kept_mass, 4)
    _add(table, "tail mass", found.kept_mass, 4, turned=True)
    _add(table, "entropy (nats)", found.entropy, 3)
    _add(table, "surprise (nats)", found.surprise, 3)
    print_wide(table, WIDTH)
    if not found.keeps_ids:
        out.print("Rows have no ids: only the log-probability of the next token is kept.", style="dim")
    elif found.kept_mass is None and found.rows:
        out.print("Draws stand for the whole distribution: no mass is left out.", style="dim")
    if found.surprise is not None:
        out.print(f"teacher's cross entropy {found.cross_entropy:.4f} nats a token, perplexity {found.perplexity:,.2f}")
    if found.label_kept is not None:
        out.print(f"next token among the ids: {found.label_kept:.2%} of {found.labelled:,} rows that have one")
    _show_arrays(found)
    _show_places(found)
    if found.keeps_ids:
        _show_ids(found)


def _add(table: Table, name: str, summary: Summary | None, digits: int, turned: bool = False) -> None:
    """A row of the table; `turned`: of 1 minus what is summed up."""
    if summary is None:
        return
    values = [summary.p1, summary.p10, summary.p50, summary.p90, summary.p99, summary.least, summary.most]
    if turned:
        # The least of one is the most of the other.
        values = [1 - value for value in (*reversed(values[:5]), values[6], values[5])]
    mean = 1 - summary.mean if turned else summary.mean
    whole = name == "ids"
    cells = [f"{mean:,.{digits}f}", *(f"{value:,.{0 if whole else digits}f}" for value in values)]
    table.add_row(Text(name, style="dim"), *cells)


def _show_arrays(found: CacheStats) -> None:
    table = plain_table(("array", "bytes", "B/token", "share"), left=("array",))
    total = sum(found.array_bytes.values())
    for name, count in found.array_bytes.items():
        table.add_row(name, f"{count:,}", f"{count / found.shard_tokens:.2f}", f"{count / total:.1%}")
    table.add_row("all arrays", f"{total:,}", f"{total / found.shard_tokens:.2f}", "", style="bold")
    print_wide(table, WIDTH)
    out.print(f"and {found.codebook_bytes:,} bytes of tables in the whole cache", style="dim")


def _show_places(found: CacheStats) -> None:
    table = plain_table(("position", "ids", "mass kept", "entropy", "cross entropy"))
    for place in found.places:
        last = place.stop - 1
        table.add_row(
            str(place.first) if last == place.first else f"{place.first}-{last}",
            *(_cell(value, digits) for value, digits in ((place.ids, 1), (place.kept_mass, 4))),
            *(_cell(value, 3) for value in (place.entropy, place.cross_entropy)),
        )
    print_wide(table, WIDTH)


def _show_ids(found: CacheStats) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("token", overflow="fold")
    for name in ("in rows", "mean weight"):
        table.add_column(name, justify="right", no_wrap=True)
    for used in found.top_ids[:SHOWN_IDS]:
        token = "" if used.token is None else repr(used.token)
        table.add_row(str(used.id), Text(token), f"{used.row_share:.1%}", f"{used.mean_weight:.4f}")
    print_wide(table, WIDTH)
    out.print(f"{counted(found.distinct_ids, 'id is', 'ids are')} kept by some row", style="dim")


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
