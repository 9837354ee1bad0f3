"""`logitcache export` and `logitcache import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from logitcache.store import open_cache
from tests.caches import Dumped
from tests.cli.conftest import Main


def test_out_and_in_again(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    cache = open_cache(dumped.top_k)
    out = logitcache("export", dumped.top_k, "--to", "distillkit", "--out", tmp_path / "out", "--json")
    assert out.status == 0
    facts = json.loads(out.out)
    assert (facts["tokens"], facts["blocks"], facts["fingerprint"]) == (
        cache.num_tokens, cache.num_blocks, cache.fingerprint,
    )  # fmt: skip
    assert facts["bytes"] == sum((tmp_path / "out" / name).stat().st_size for name in facts["files"])
    line = [
        "import",
        "--from",
        "distillkit",
        tmp_path / "out",
        "--out",
        tmp_path / "back",
        "--tokenizer",
        dumped.teacher,
    ]
    back = logitcache(*line, "--json")
    assert back.status == 0
    facts = json.loads(back.out)
    opened = open_cache(tmp_path / "back")
    assert (facts["tokens"], facts["fingerprint"]) == (cache.num_tokens, opened.fingerprint)
    assert (facts["left_out"], facts["block_length"]) == (0, 32)
    again = logitcache(*line)
    assert (again.status, f"{cache.num_tokens:,} tokens" in again.out) == (0, True)
    shown = logitcache("inspect", tmp_path / "back", "--block", "1", "--json")
    facts = json.loads(shown.out)
    assert "Line" in facts["text"]
    assert (facts["entropy"], facts["cross_entropy"]) == (None, None)
    assert logitcache("verify", tmp_path / "back").status == 0


def test_export_prints_what_it_wrote(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    shown = logitcache("export", dumped.sample, "--to", "parquet", "--out", tmp_path / "out", "--blocks", "2:5")
    assert shown.status == 0
    assert "96 tokens in 2 files" in shown.out
    assert pq.read_table(tmp_path / "out" / "data").num_rows == 96


CASES: dict[str, tuple[int, str, list[Any]]] = {
    "unbiased": (1, "holds unbiased samples", ["export", "{sample}", "--to", "trl", "--out", "{tmp}/out"]),
    "no cache": (1, "does not exist", ["export", "{tmp}/nothing", "--to", "trl", "--out", "{tmp}/out"]),
    "blocks": (2, "more than one range", ["export", "{top_k}", "--to", "trl", "--out", "{tmp}/out", "--blocks", "0,2"]),
    "wide layout": (
        2, "only 8; lower k", ["export", "{top_k}", "--to", "distillkit", "--layout", "budget", "--out", "{tmp}/out"],
    ),
    "used folder": (1, "is not empty", ["export", "{top_k}", "--to", "trl", "--out", "{sample}"]),
    "target": (2, "is not one of", ["export", "{top_k}", "--to", "csv", "--out", "{tmp}/out"]),
    "no capture": (
        1, "does not exist", ["import", "--from", "distillkit", "{tmp}/a", "--out", "{tmp}/b", "--tokenizer", "{tmp}"],
    ),
    "a cache is no capture": (
        1,
        "no .parquet file",
        [
            "import", "--from", "distillkit", "{top_k}", "--out", "{tmp}/out", "--tokenizer", "{teacher}",
            "--layout", "budget", "--vocab-size", "300",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_mistakes(name: str, logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    status, message, line = CASES[name]
    places = {"tmp": tmp_path, **vars(dumped)}
    ran = logitcache(*(part.format(**places) for part in line))
    assert (ran.status, message in ran.sentence) == (status, True), ran.err
    assert not list(tmp_path.iterdir())
