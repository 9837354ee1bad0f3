"""docs/interchange.md runs, and lists the columns that are written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from logitcache.interchange import TARGETS, export_cache
from logitcache.store import open_cache
from tests.caches import Dumped

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "interchange.md").read_text()


def test_example_runs(
    dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    shutil.copytree(dumped.top_k, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "interchange.md", "exec"), {})
    block, position, *_ = capsys.readouterr().out.split()
    weights = open_cache("cache").read_blocks(0, 2).targets.padded()[1].max(axis=1)
    assert weights[int(block) * 32 + int(position)] == weights.max()


@pytest.mark.parametrize("target", TARGETS)
def test_tables_list_the_columns(target: str, dumped: Dumped, tmp_path: Path) -> None:
    """Those of the page, of the folder's README and of the files are the same."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(f"`{target}`")]
    table = text.split("|---|---|")[1].split("\n\n")[0]
    listed = [
        name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    ]
    report = export_cache(open_cache(dumped.top_k), target, tmp_path / "out")
    names = pq.read_schema(tmp_path / "out" / report.files[0]).names
    assert listed == names
    assert re.findall(r"^\| `(\w+)` \|", (tmp_path / "out" / "README.md").read_text(), re.MULTILINE) == names
