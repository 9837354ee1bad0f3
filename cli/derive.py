"""`logitcache derive`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .console import debug_option, json_option, out
from .options import new_cache_option
from .progress import StageView
from .results import print_result

EXAMPLE = """
\b
Example:
  logitcache derive cache --select top-k:12 --out smaller
  logitcache derive cache --select sample:25 --max-tail-mass 0.05 --out drawn
  logitcache derive cache --drop entropy --drop label_logprob --codec fast --out plain

\b
From top-k:K      top-k:k and top-p:P:k with k <= K; sample:N
From top-p:P:K    top-p:p:k with p <= P and k <= K; sample:N
From sample:N     sample:n with n <= N: n of the N draws, still unbiased

Without --select rows keep every value. Of ids that are stored with equal weights, fewer ids keep the smaller.

Draws from top-k or top-p never hit the tail: they are unbiased for the stored ids, renormalised, and an id's expected
weight is off by at most the row's tail mass. The mean tail mass is measured first, recorded in the new cache
(`inspect` shows it), and refused above --max-tail-mass. Run the same line again to resume after an interruption.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""


@click.command(epilog=EXAMPLE)
@click.argument("source", type=click.Path(), metavar="CACHE")
@new_cache_option
@click.option("--select", metavar="SPEC", help="What to keep, for example top-k:12; by default all that is stored.")
@click.option(
    "--drop", multiple=True, type=click.Choice(["entropy", "label_logprob"]), help="Forget a column; may be repeated."
)
@click.option("--codec", type=click.Choice(["small", "fast"]), help="Layout; by default that of the source.")
@click.option("--seed", default=0, show_default=True, help="Of the draws.")
@click.option(
    "--max-tail-mass",
    default=0.01,
    show_default=True,
    help="Most mass, on average, that draws from top-k or top-p may miss.",
)
@json_option
@debug_option
def derive(source: str, root: Path, select: str | None, as_json: bool, **rest: Any) -> None:
    """Make a smaller cache from one that is stored, without a teacher."""
    from logitcache.algebra import Derivation, derive_cache
    from logitcache.selection import Selection

    derivation = Derivation(None if select is None else Selection.parse(select), **rest)
    with StageView("derive") as view:
        result = derive_cache(source, root, derivation, view)
    print_result(result, as_json)
    if not as_json and "mean_tail_mass" in result.notes:
        out.print(f"Mean tail mass, which no draw could hit: {result.notes['mean_tail_mass']:.4f}")
