"""The programs under examples/ run, and go on where they were left."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.caches import Dumped

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> list[str]:
    """The lines it prints."""
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("one_thread")
def test_plain_loop(
    dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loop(checkpoint: str, steps: int) -> list[str]:
        return run("plain_loop.py", monkeypatch, capsys, dumped.sample, dumped.teacher, tmp_path / checkpoint, steps)

    whole = loop("whole.pt", 5)
    assert whole[0].startswith("8 blocks: loss ")
    assert loop("parts.pt", 2) + loop("parts.pt", 3) == whole


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_stateful_dataloader(
    dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loop(state: str, batches: int) -> list[str]:
        return run("stateful_dataloader.py", monkeypatch, capsys, dumped.top_k, tmp_path / state, batches)

    whole = loop("whole.pt", 5)
    assert len(set(whole)) == 5
    assert loop("parts.pt", 3) + loop("parts.pt", 2) == whole


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_lightning_module(
    dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loop(checkpoint: str, steps: int) -> list[str]:
        said = run(
            "lightning_module.py", monkeypatch, capsys, dumped.sample, dumped.teacher, tmp_path / checkpoint, steps
        )
        return [line for line in said if "blocks: loss" in line]

    whole = loop("whole.ckpt", 5)
    assert whole[4].startswith("40 blocks: loss ")
    assert loop("parts.ckpt", 2) + loop("parts.ckpt", 3) == whole


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lengths.keys() == {"lightning_module.py", "plain_loop.py", "stateful_dataloader.py"}
    assert max(lengths.values()) <= 40
