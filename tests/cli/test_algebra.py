"""`derive`, `merge` and `subset` as a user meets them: tables, JSON, refusals in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

from logitcache.store import open_cache
from tests.algebra.caches import PROSE, two_corpora, workers
from tests.caches import Dumped, random_cache
from tests.cli.conftest import Main
from tests.cli.test_commands import modules_of


def test_derive(logitcache: Main, tmp_path: Path) -> None:
    source = random_cache(tmp_path / "source", "counts", 4, PROSE)
    line = ["derive", source.root, "--select", "sample:4", "--drop", "entropy", "--out", tmp_path / "new"]
    shown = logitcache(*line)
    assert shown.status == 0
    assert "sample:4" in shown.out
    assert "103 tokens written in" in shown.out
    assert "derive: writing" in shown.err
    facts = json.loads(logitcache(*line, "--json").out)
    cache = open_cache(tmp_path / "new")
    assert facts["computed_tokens"] == 0
    assert (facts["tokens"], facts["blocks"], facts["bytes"]) == (103, 21, cache.num_bytes)
    assert facts["fingerprint"] == cache.fingerprint
    assert facts["bytes_per_token"] == cache.num_bytes / 103
    assert "Nothing was left to write." in logitcache(*line).out


def test_derive_says_what_draws_miss(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    line = ["derive", dumped.top_k, "--select", "sample:5", "--out", tmp_path / "new"]
    refused = logitcache(*line)
    assert refused.status == 1
    assert "no draw from it can hit a tail" in refused.sentence
    assert "--max-tail-mass" in refused.sentence
    accepted = logitcache(*line, "--max-tail-mass", "1")
    assert accepted.status == 0
    assert "Mean tail mass, which no draw could hit: 0." in accepted.out
    shown = logitcache("inspect", tmp_path / "new")
    assert "mean_tail_mass=0." in shown.out
    assert json.loads(logitcache("inspect", tmp_path / "new", "--json").out)["tail mass left out"] > 0.01


def test_merge(logitcache: Main, tmp_path: Path) -> None:
    folders = workers(tmp_path, [[2], [0]])
    shown = logitcache("merge", *folders, "--out", tmp_path / "new")
    assert shown.status == 0
    assert "1 unit is missing; merge the caches" in shown.out
    facts = json.loads(logitcache("merge", *folders, "--out", tmp_path / "new", "--json").out)
    assert facts["missing_units"] == [1]
    assert facts["complete"] is False
    prose, code = two_corpora(tmp_path)
    facts = json.loads(logitcache("merge", prose.root, code.root, "--out", tmp_path / "both", "--json").out)
    assert facts["complete"] is True
    assert (facts["tokens"], facts["blocks"]) == (150, 31)


def test_subset(logitcache: Main, tmp_path: Path) -> None:
    source = random_cache(tmp_path / "source", "counts", 4, PROSE)
    (tmp_path / "list").write_text("20\n0:4\n")
    line = ["subset", source.root, "--blocks", f"@{tmp_path / 'list'}", "--out", tmp_path / "new", "--json"]
    facts = json.loads(logitcache(*line).out)
    assert (facts["tokens"], facts["blocks"]) == (23, 5)


def test_one_sentence_for_each_mistake(logitcache: Main, tmp_path: Path) -> None:
    source = random_cache(tmp_path / "source", "counts", 4, PROSE).root
    mistakes = [
        (2, "nothing of", "derive", source),
        (2, "it needs more draws than are stored", "derive", source, "--select", "sample:50"),
        (2, "draws do not tell which ids", "derive", source, "--select", "top-k:3"),
        (2, "is not understood", "derive", source, "--select", "top:3"),
        (2, "Invalid value for '--drop'", "derive", source, "--drop", "tail_mass"),
        (1, "does not exist or is not a folder", "derive", tmp_path / "nothing", "--drop", "entropy"),
        (2, "blocks 5:99 are empty or outside the cache", "subset", source, "--blocks", "5:99"),
        (2, "block 3 is listed more than once", "subset", source, "--blocks", "3,0:5"),
        (2, "the block list", "subset", source, "--blocks", "@nowhere"),
        (2, "Missing argument 'CACHE...'", "merge"),
        (2, "are the same cache; give it once", "merge", source, source),
    ]
    for status, said, *line in mistakes:
        ran = logitcache(*line, "--out", tmp_path / "new")
        assert ran.status == status, line
        assert said in ran.sentence, line
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    ran = logitcache("subset", source, "--blocks", "3", "--out", tmp_path / "full")
    assert ran.status == 1
    assert "is not empty and not a logitcache cache" in ran.sentence


def test_they_load_no_torch(tmp_path: Path) -> None:
    source = random_cache(tmp_path / "source", "counts", 4, PROSE).root
    loaded = modules_of("derive", source, "--select", "sample:4", "--out", tmp_path / "new")
    assert "logitcache.algebra" in loaded
    assert not loaded & {"torch", "transformers", "matplotlib", "pyarrow"}
