"""`logitcache import`."""

from __future__ import annotations

from typing import Any

import click

from .console import counted, debug_option, json_option, out, print_json
from .options import NEW_PATH, cache_options
from .progress import DumpView

EXAMPLE = """
\b
Example:
  logitcache import --from distillkit captured --out cache --tokenizer ./SmolLM2-135M
  logitcache import --from distillkit data_0.parquet --layout config.yaml --out cache --tokenizer ./SmolLM2-135M

The capture's configuration says what its bytes mean: compression_config.yaml beside the files, or --layout. Entropy
is not in such files; the log-probability of a next token that is not among the k ids is not either.
Run the same line again to resume after an interruption. Details: docs/interchange.md.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""


@click.command("import", epilog=EXAMPLE)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--from", "source", required=True, type=click.Choice(["distillkit"]), help="Whose files they are.")
@click.option("--out", required=True, type=NEW_PATH, metavar="CACHE", help="Cache folder.")
@click.option("--tokenizer", required=True, metavar="DIR_OR_ID", help="The tokenizer that made the tokens.")
@click.option("--layout", metavar="NAME|FILE", help="recommended, budget, or a YAML file of logprob_compressor fields.")
@click.option("--vocab-size", type=int, metavar="V", help="Rows of the teacher's LM head; default: the layout's d.")
@click.option(
    "--block-length", type=int, metavar="N", help="Keep N positions of each sequence, leave out shorter ones."
)
@cache_options
@json_option
@debug_option
def import_(source: str, as_json: bool, **rest: Any) -> None:
    """Make a cache of another tool's stored teacher distributions."""
    from logitcache.interchange import ImportOptions, import_distillkit
    from logitcache.store import open_cache

    with DumpView("import") as view:
        report = import_distillkit(ImportOptions(**rest), view)
    cache = open_cache(rest["out"])
    facts = {
        "cache": str(cache.root),
        "from": source,
        "tokens": cache.num_tokens,
        "blocks": cache.num_blocks,
        "block_length": cache.block_length,
        "left_out": report.left_out,
        "rescaled_rows": report.rescaled,
        "bytes": cache.num_bytes,
        "bytes_per_token": cache.num_bytes / cache.num_tokens,
        "fingerprint": cache.fingerprint,
    }
    if as_json:
        print_json(facts)
        return
    size = f"{cache.num_bytes / 1e6:,.2f} MB, {facts['bytes_per_token']:.1f} B/token"
    out.print(f"{cache.root}: {cache.num_tokens:,} tokens in {counted(cache.num_blocks, 'block')}, {size}")
    if report.left_out:
        out.print(f"left out: {counted(report.left_out, 'sequence')} of fewer than {cache.block_length} positions")
    if report.rescaled:
        share = report.rescaled / cache.num_tokens
        out.print(
            f"{counted(report.rescaled, 'position')} ({share:.1%}) decoded to probabilities that sum to more than 1: "
            "approximated entries were scaled down"
        )
