"""The package as it is built and described: package list, public names, examples in the documents, help texts."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import logitcache
from logitcache.cli.main import cli

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(cli.commands)


def test_package_list_matches_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "logitcache").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"logitcache.cli"}
    assert sorted(listed) == sorted(found)


def test_public_names() -> None:
    assert logitcache.__all__ == [
        "Blocks", "Cache", "SparseTargets", "__version__", "errors", "losses", "open_cache", "verify",
    ]  # fmt: skip
    assert all(getattr(logitcache, name) is not None for name in logitcache.__all__)
    assert callable(logitcache.losses.distillation_loss)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        logitcache.nothing  # noqa: B018


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_exit_statuses(name: str) -> None:
    command = cli.commands[name]
    below = list(command.commands)[:1] if isinstance(command, click.Group) else []
    shown = CliRunner().invoke(cli, [name, *below, "--help"])
    assert shown.exit_code == 0
    assert f"logitcache {name}" in shown.output.split("Example:")[1]
    assert "Exit status" in shown.output
    assert "--debug" in shown.output


def documented_lines() -> list[str]:
    texts = [(ROOT / "README.md").read_text(), *(str(command.epilog) for command in cli.commands.values())]
    return sorted({line.strip() for text in texts for line in re.findall(r"^\s+(logitcache .*)$", text, re.MULTILINE)})


@pytest.mark.parametrize("line", documented_lines())
def test_documented_command_lines_parse(line: str) -> None:
    """Every `logitcache ...` line of README and help texts names real commands and options."""
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = cli.commands[name]
    command.make_context(name, arguments, parent=click.Context(cli))


def test_readme_lists_every_command() -> None:
    listed = re.findall(r"^\| `logitcache (\w+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == COMMANDS


def test_typo_gets_exit_status_2() -> None:
    assert CliRunner().invoke(cli, ["dmup"]).exit_code == 2
    assert CliRunner().invoke(cli, ["verify"]).exit_code == 2
