"""`logitcache`: the command group. Commands import what they need when they run, so that --help is quick."""

from __future__ import annotations

import click

from logitcache import __version__

from .bench import bench
from .console import Commands, run
from .convert import convert
from .demo import demo
from .derive import derive
from .dump import dump
from .export import export
from .gc import gc
from .import_ import import_
from .inspect import inspect
from .merge import merge
from .plan import plan
from .plot import plot
from .pull import pull
from .push import push
from .repair import repair
from .stats import stats
from .subset import subset
from .train import train
from .verify import verify


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="logitcache")
def cli() -> None:
    """Distil language models without a live teacher.

    `dump` runs a teacher once over a corpus and stores what it knows of every next token; `train` teaches students
    from that cache, as many as you like. Start with `logitcache demo`.
    """


COMMANDS = (
    *(plan, dump, train, inspect, verify, stats, plot),
    *(derive, merge, subset, convert, export, import_, push, pull),
    *(gc, repair, bench, demo),
)
for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Entry point of the console script."""
    run(lambda: cli(standalone_mode=False))


if __name__ == "__main__":
    main()
