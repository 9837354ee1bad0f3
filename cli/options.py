"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]


class NewPath(click.Path):
    """A path to write to. An empty one, as of a shell's unset variable, would be the current folder."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty, which would be the current folder; give a name, or . for that", parameter, context)
        return super().convert(value, parameter, context)


NEW_PATH = NewPath(path_type=Path)


def teacher_options(command: Command) -> Command:
    """Add `--teacher`, `--gguf-file` and `--corpus`: what a dump reads."""
    command = click.option(
        "--corpus", required=True, multiple=True, metavar="PATH", help="File, folder or glob; may be repeated."
    )(command)
    command = click.option("--gguf-file", metavar="FILE", help="GGUF file inside the teacher's folder.")(command)
    return click.option(
        "--teacher",
        required=True,
        metavar="DIR_OR_ID",
        help="Folder or hub id of a causal language model (dump: or URL of a server).",
    )(command)


def field_options(command: Command) -> Command:
    """Add `--text-field` and the others that say what records of a corpus hold."""
    helps = {
        "--mask-field": "Beside token ids: 0 or 1 for each, whether it is to be learnt.",
        "--ids-field": "Token ids of the teacher's tokenizer, instead of text.",
        "--messages-field": "Conversations; the tokenizer's chat template writes them, the assistant's part is learnt.",
        "--completion-field": "The text after the prompt, which alone is learnt.",
        "--prompt-field": "Prompts, with --completion-field instead of --text-field.",
    }
    for name, text in helps.items():
        command = click.option(name, metavar="NAME", help=text)(command)
    return click.option(
        "--text-field",
        default="text",
        show_default=True,
        metavar="NAME",
        help="Text: a field of JSONL objects, or a column of Parquet and Arrow files.",
    )(command)


def server_options(command: Command) -> Command:
    """Add what says how a teacher behind a server is asked; `server_of` takes it out of a command's arguments."""
    for option in (
        click.option(
            "--request-timeout", type=float, metavar="S", help="Seconds for one request to the server; default: 600."
        ),
        click.option("--requests-per-second", type=float, metavar="N", help="At most so many requests to the server."),
        click.option(
            "--concurrency", type=int, metavar="N", help="Requests to the server under way at once; default: 8."
        ),
        click.option("--tokenizer", metavar="DIR_OR_ID", help="The teacher's tokenizer; needed with a server."),
        click.option("--teacher-model", metavar="NAME", help="Model to ask, where the server has several."),
    ):
        command = option(command)
    return command


def server_of(given: dict[str, Any]) -> Any:
    """The ServerOptions of a command with `server_options`, whose arguments are removed from `given`."""
    from logitcache.teachers import ServerOptions

    names = {
        "teacher_model": "model",
        "concurrency": "concurrency",
        "requests_per_second": "requests_per_second",
        "request_timeout": "timeout",
    }
    values = {name: given.pop(option) for option, name in names.items()}
    return ServerOptions(**{name: value for name, value in values.items() if value is not None})


def new_cache_option(command: Command) -> Command:
    """Add `--out`, as `root`, to a command that makes a cache of others."""
    return click.option(
        "--out",
        "root",
        required=True,
        type=NEW_PATH,
        metavar="CACHE",
        help="The new cache; no cache that is read, nor a folder inside one.",
    )(command)


def cache_options(command: Command) -> Command:
    """Add `--codec` and `--container`: how a new cache is stored."""
    command = click.option(
        "--container",
        default="zarr",
        show_default=True,
        type=click.Choice(["zarr", "arrow"]),
        help="Files of the cache: Zarr v3 zips (smaller) or Arrow IPC (any Arrow reader opens them).",
    )(command)
    return click.option(
        "--codec",
        default="small",
        show_default=True,
        type=click.Choice(["small", "fast"]),
        help="small: fewest bytes; fast: fastest to read.",
    )(command)


def rows_options(command: Command) -> Command:
    """Add `--blocks`, `--sample`, `--seed` and `--tokenizer`: which rows of a cache to count, and how to show ids."""
    command = click.option(
        "--tokenizer", metavar="DIR", help="The teacher's tokenizer, if it is no longer where the dump found it."
    )(command)
    command = click.option("--seed", default=0, show_default=True, help="Of the choice that --sample makes.")(command)
    command = click.option("--sample", type=int, metavar="N", help="Read only N chunks, chosen at random.")(command)
    return click.option("--blocks", metavar="RANGES", help="Only these blocks, for example 0:100,250; or @FILE.")(
        command
    )
