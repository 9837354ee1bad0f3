"""`logitcache bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from logitcache.cli.console import out
from tests.caches import Dumped
from tests.cli.conftest import Main


def test_storage(logitcache: Main, dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["bench", "storage", "--teacher", dumped.teacher, "--corpus", dumped.corpus, "--max-tokens", 512]
    line += ["--block-length", 32, "--positions", 64, "--select", "sample:9", "--out", tmp_path / "bench"]
    monkeypatch.setattr(out, "_width", 80)
    shown = logitcache(*line)
    assert shown.status == 0
    assert "small, zarr" in shown.out
    assert "…" not in shown.out, "nothing is cut, however narrow the terminal"
    assert (tmp_path / "bench" / "storage.png").read_bytes()[:4] == b"\x89PNG"
    facts = json.loads(logitcache(*line, "--json").out)
    assert [row["layout"] for row in facts["measurements"]][:2] == ["small, zarr", "fast, zarr"]
    wrong = logitcache(*line, "--select", "top-k:none")
    assert (wrong.status, "selection 'top-k:none' is not understood" in wrong.err) == (2, True)
