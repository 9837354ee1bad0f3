"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .batch_tokens import BatchTokens

Command = Callable[..., Any]


def choice(name: str, *choices: str, help: str) -> Callable[[Command], Command]:
    """An option that takes one of some words, the first by default."""
    return click.option(name, default=choices[0], show_default=True, type=click.Choice(choices), help=help)


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which `--help` shall list them."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


class NewPath(click.Path):
    """A path to write to. An empty one, as of a shell's unset variable, would be the current folder."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty, which would be the current folder; give a name, or . for that", parameter, context)
        return super().convert(value, parameter, context)


NEW_PATH = NewPath(path_type=Path)


def teacher_options(command: Command) -> Command:
    """Add `--teacher`, `--gguf-file` and `--corpus`: what a dump reads."""
    return together(
        click.option(
            "--teacher",
            required=True,
            metavar="DIR_OR_ID",
            help="Folder or hub id of a causal language model; for dump and plan also URL of a server.",
        ),
        click.option("--gguf-file", metavar="FILE", help="GGUF file inside the teacher's folder."),
        click.option(
            "--corpus", required=True, multiple=True, metavar="PATH", help="File, folder or glob; may be repeated."
        ),
    )(command)


def device_map_option(command: Command) -> Command:
    """Add `--device-map`."""
    return click.option(
        "--device-map",
        metavar="MAP",
        help="Spread the teacher over all GPUs: auto, balanced, sequential, or a JSON file {module: device}.",
    )(command)


def _teacher_run_options(command: Command) -> Command:
    """Add what says how much of the corpus a dump's teacher reads, in what pieces and how it computes."""
    return together(
        click.option("--block-length", default=1024, show_default=True, help="Tokens in a block."),
        click.option("--max-tokens", type=int, help="Stop the corpus after so many tokens."),
        choice("--dtype", "auto", "float32", "bfloat16", "float16", help="auto: as the teacher is stored."),
        choice("--device", "auto", "cpu", "cuda", help="Where the teacher runs."),
        device_map_option,
        click.option(
            "--batch-tokens",
            default="auto",
            show_default=True,
            type=BatchTokens(),
            help="Tokens in one forward pass, or asked for together. auto: found by trial on a GPU, 4,096 elsewhere.",
        ),
        click.option(
            "--compile",
            is_flag=True,
            help="Run the teacher's body through torch.compile: slow to begin with, then faster; needs a C++ compiler.",
        ),
        click.option(
            "--unit-tokens",
            type=int,
            help="Tokens committed at once; default: about 1/32 of the corpus, 16,384 to 4 million.",
        ),
        click.option("--seed", default=0, show_default=True, help="Of sampled selections."),
        choice(
            "--nonfinite",
            "fail",
            "mask",
            help="Where the teacher's logits are NaN or infinite: end the dump, or leave that row out and count it.",
        ),
    )(command)


def field_options(command: Command) -> Command:
    """Add `--text-field` and the others that say what records of a corpus hold."""
    helps = {
        "--prompt-field": "Prompts, with --completion-field instead of --text-field.",
        "--completion-field": "The text after the prompt, which alone is learnt.",
        "--messages-field": "Conversations; the tokenizer's chat template writes them, the assistant's part is learnt.",
        "--ids-field": "Token ids of the teacher's tokenizer, instead of text.",
        "--mask-field": "Beside token ids: 0 or 1 for each, whether it is to be learnt.",
    }
    return together(
        click.option(
            "--text-field",
            show_default="text",
            metavar="NAME",
            help="Text: a field of JSONL objects, or a column of Parquet and Arrow files.",
        ),
        *(click.option(name, metavar="NAME", help=text) for name, text in helps.items()),
    )(command)


def special_token_options(command: Command) -> Command:
    """Add `--bos` and `--eos`: where a corpus gets special tokens."""
    return together(
        choice(
            "--bos",
            "auto",
            "none",
            "document",
            "block",
            help="Where BOS goes. auto: as the tokenizer puts it; none with messages and token ids, which have "
            "their own.",
        ),
        choice("--eos", "auto", "none", "document", help="Where EOS goes; auto as there."),
    )(command)


def run_options(command: Command) -> Command:
    """Add all that says of which text, and how, a dump's teacher makes rows: what `dump` and `plan` are both told."""
    return together(_teacher_run_options, field_options, special_token_options)(command)


def workers_option(command: Command) -> Command:
    """Add `--workers`."""
    return click.option("--workers", type=int, help="Processes with a teacher each; local: 1, ray: one for each GPU.")(
        command
    )


def trust_option(command: Command) -> Command:
    """Add `--trust-remote-code`."""
    return click.option(
        "--trust-remote-code", is_flag=True, help="Let the teacher's folder run Python code of its own."
    )(command)


def server_options(command: Command) -> Command:
    """Add what says how a teacher behind a server is asked; `server_of` takes it out of a command's arguments."""
    return together(
        click.option("--teacher-model", metavar="NAME", help="Model to ask, where the server has several."),
        click.option("--tokenizer", metavar="DIR_OR_ID", help="The teacher's tokenizer; needed with a server."),
        click.option(
            "--concurrency", type=int, metavar="N", help="Requests to the server under way at once; default: 8."
        ),
        click.option("--requests-per-second", type=float, metavar="N", help="At most so many requests to the server."),
        click.option(
            "--request-timeout", type=float, metavar="S", help="Seconds for one request to the server; default: 600."
        ),
    )(command)


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


def codec_option(*choices: str) -> Callable[[Command], Command]:
    """Add `--codec`, the first choice by default."""
    return choice("--codec", *choices, help="small: fewest bytes; fast: fastest to read.")


def container_option(command: Command) -> Command:
    """Add `--container`."""
    return choice(
        "--container",
        "zarr",
        "arrow",
        help="Files of the cache: Zarr v3 zips (smaller) or Arrow IPC (any Arrow reader opens them).",
    )(command)


def cache_options(command: Command) -> Command:
    """Add `--codec` and `--container`: how a new cache is stored."""
    return together(codec_option("small", "fast"), container_option)(command)


def rows_options(command: Command) -> Command:
    """Add `--blocks`, `--sample`, `--seed` and `--tokenizer`: which rows of a cache to count, and how to show ids."""
    return together(
        click.option("--blocks", metavar="RANGES", help="Only these blocks, for example 0:100,250; or @FILE."),
        click.option("--sample", type=int, metavar="N", help="Read only N chunks, chosen at random."),
        click.option("--seed", default=0, show_default=True, help="Of the choice that --sample makes."),
        click.option(
            "--tokenizer", metavar="DIR", help="The teacher's tokenizer, if it is no longer where the dump found it."
        ),
    )(command)
