"""`logitcache dump --watch`: what the workers of a dump do, from another terminal or machine."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import click

from .console import counted, debug_option, err, json_option, out, print_json, writing_nothing
from .progress import DumpView

_SECONDS = 1.0


@click.command()
@click.option("--watch", "cache", required=True, type=click.Path(), metavar="CACHE")
@json_option
@debug_option
def watch(cache: str, as_json: bool) -> None:
    """Show the workers of a dump until the cache is complete; with --json print one snapshot."""
    from logitcache.engines.sights import sight_of
    from logitcache.engines.watch import snapshot

    pause = max(_SECONDS, sight_of(cache).pause)
    seen = snapshot([cache])
    if as_json:
        print_json(asdict(seen))
        return
    try:
        with writing_nothing(), DumpView("watch") as view:
            while not seen.complete:
                view.workers(seen)
                time.sleep(pause)
                seen = snapshot([cache])
    except KeyboardInterrupt:
        err.print("Only the view ended; the dump goes on.")
        return
    out.print(f"{cache}: complete, {seen.done_tokens:,} tokens in {counted(seen.committed_units, 'unit')}")


class Watchable(click.Command):
    """A command that needs none of its options beside `--watch CACHE`."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of `watch` where that is asked for."""
        watching = any(argument.partition("=")[0] == "--watch" for argument in args)
        if watching and not set(args) & {"--help", "-h"}:
            try:
                return watch.make_context(info_name, args, parent, **extra)
            except click.NoSuchOption as error:
                said = f"{error.option_name} is of a dump, and --watch only looks at one; leave it out"
                raise click.UsageError(said) from error
        return super().make_context(info_name, args, parent, **extra)
