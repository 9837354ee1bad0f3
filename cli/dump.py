"""`logitcache dump`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .console import counted, debug_option, json_option, out, plain_table, print_json
from .options import (
    NewPath,
    cache_options,
    choice,
    run_options,
    server_of,
    server_options,
    teacher_options,
    trust_option,
    workers_option,
)
from .plan_table import show_plan
from .progress import DumpView
from .results import left_out_line, print_speed
from .watch import Watchable

EXAMPLE = """
\b
Example:
  logitcache dump --teacher ./SmolLM2-135M --corpus 'texts/*.txt' --select sample:25 --out cache
  logitcache dump --teacher http://127.0.0.1:8000/v1 --tokenizer ./SmolLM2-135M --corpus t.txt --select top-k:20 --out c

The second asks a server (vLLM or SGLang) for top-k or top-p; its key is read from LOGITCACHE_API_KEY.

\b
Selections: top-k:K (K most probable ids), top-p:P:K (mass P, at most K ids), sample:N (N unbiased draws),
sample:N:T (N draws from p^T, weighted to be unbiased), varopt:K (K ids: exact head, least-variance tail),
label (no ids, only log p of the text's own next token: for policy-gradient).

\b
Prompts with completions, conversations and token ids are read where their fields are named:
  --prompt-field prompt --completion-field completion    rows for completions only
  --messages-field messages                              rows for what the assistant says only
  --ids-field input_ids [--mask-field completion_mask]   no tokenising; also of a folder that `datasets` saved

Run the same line again to resume after an interruption.

\b
Several workers share one dump through the cache's folder or bucket (docs/dumping.md); the result is the same:
  --workers 8          processes of this machine, each on a GPU of its own
  --engine torchrun    this process is one of those that torchrun or srun started
  --engine ray         workers on a Ray cluster
  logitcache dump --watch cache      # all of them in one view

A teacher too large for one GPU: --device-map auto, or --engine torchrun --tensor-parallel.

\b
Into a bucket, resumed from any machine; AWS_ENDPOINT_URL names an endpoint other than AWS:
  --out s3://bucket/prefix [--staging FOLDER]

Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""


@click.command(
    cls=Watchable, epilog=EXAMPLE, short_help="Run a teacher over a corpus once; store sparse distributions."
)
@teacher_options
@click.option(
    "--out", "root", required=True, type=NewPath(), metavar="CACHE", help="Cache folder, or s3://bucket/prefix."
)
@click.option(
    "--select", required=True, metavar="SPEC", help="What to keep, for example sample:50, varopt:12 or label."
)
@click.option(
    "--also", type=(str, NewPath()), multiple=True, metavar="SPEC CACHE", help="Write another cache from the same run."
)
@click.option(
    "--staging",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where to work on caches in a bucket; default: below ~/.cache/logitcache. Removed when they are complete.",
)
@run_options
@cache_options
@choice("--engine", "local", "torchrun", "ray", help="Who starts the workers: this command, torchrun or srun, or Ray.")
@click.option(
    "--tensor-parallel", is_flag=True, help="All ranks that torchrun started are one teacher, split over their GPUs."
)
@workers_option
@click.option(
    "--lease-seconds", default=60.0, show_default=True, help="A worker silent for so long loses its unit to another."
)
@click.option(
    "--watch",
    expose_value=False,
    metavar="CACHE",
    help="Show the workers of a dump that runs; Ctrl-C ends the view only.",
)
@server_options
@click.option(
    "--dry-run", is_flag=True, help="Try a sample and print what the dump would take, as plan does; write nothing."
)
@trust_option
@json_option
@debug_option
def dump(
    root: str,
    select: str,
    also: tuple[tuple[str, str], ...],
    staging: Path | None,
    as_json: bool,
    dry_run: bool,
    **rest: Any,
) -> None:
    """Run a teacher over a corpus once and store its sparse distributions."""
    from logitcache.selection import Selection

    selections = [(Selection.parse(spec), place) for spec, place in [(select, root), *also]]
    from logitcache.dump import DumpOptions, Output, run_dump
    from logitcache.errors import UsageError
    from logitcache.store import open_cache

    outputs = tuple(Output.at(selection, place, staging) for selection, place in selections)
    if staging is not None and not any(output.url for output in outputs):
        raise UsageError("--staging is for caches in a bucket, and no --out is one; leave it out")
    options = DumpOptions(outputs=outputs, server=server_of(rest), **rest)
    if dry_run:
        from logitcache.planning import PlanOptions

        show_plan(PlanOptions(options, (options.codec,), together=True), "dump", as_json)
        return
    with DumpView(caches=len(outputs)) as view:
        report = run_dump(options, view)
    if not report.speaks:
        return
    facts = [
        {
            "cache": output.location,
            "select": str(output.selection),
            "tokens": report.tokens,
            "bytes": (num_bytes := open_cache(output.location).num_bytes),
            "bytes_per_token": num_bytes / report.tokens,
            **({"nonfinite": manifest.counters["nonfinite"]} if "nonfinite" in manifest.counters else {}),
            "fingerprint": manifest.fingerprint,
        }
        for output, manifest in zip(outputs, report.manifests, strict=True)
    ]
    corpus, counters = _corpus_facts(report), report.manifests[0].counters
    if as_json:
        print_json(
            {
                "corpus": corpus,
                "computed_tokens": report.computed_tokens,
                "seconds": report.seconds,
                "batch_tokens": report.batch_tokens,
                "caches": facts,
            }
        )
    else:
        _print_table(facts, report)
        line = f"Corpus: {counted(corpus['documents'], 'document')} in {counted(corpus['files'], 'file')}"
        learnt = f", {corpus['counted']:,} of {report.tokens:,} tokens to learn" if "counted" in corpus else ""
        out.print(line + learnt)
        if "nonfinite" in counters:
            out.print(left_out_line(counters["nonfinite"]), style="yellow" if counters["nonfinite"] else None)


def _corpus_facts(report: Any) -> dict[str, Any]:
    """What was read, by the names that a plan gives the same; `counted` tokens are those to learn, if not all are."""
    read, counters = report.manifests[0].identity.corpus, report.manifests[0].counters
    return {
        "tokens": report.tokens,
        "uncertainty": 0.0,
        "files": len(read["files"]),
        "bytes": sum(file["bytes"] for file in read["files"]),
        "documents": read["documents"],
        **({"counted": counters["counted"]} if "counted" in counters else {}),
    }


def _print_table(facts: list[dict[str, Any]], report: Any) -> None:
    names = ("cache", "select", "tokens", "size", "B/token")
    table = plain_table(names, left=names[:2], fold=True)
    for row in facts:
        size = f"{row['bytes'] / 1e6:,.2f} MB"
        table.add_row(
            row["cache"], row["select"], f"{row['tokens']:,}", size, f"{row['bytes_per_token']:.1f}", style="bold"
        )
    out.print(table)
    print_speed(
        report.computed_tokens, report.seconds, "compute", "computed", f", in batches of {report.batch_tokens:,}"
    )
