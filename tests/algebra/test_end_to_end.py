"""Dump two corpora, derive, merge, subset, train: through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from logitcache.store import open_cache
from tests.caches import Dumped, corpus_text, student_yaml
from tests.cli.conftest import Main
from tests.cli.conftest import logitcache as logitcache


@pytest.fixture
def made(logitcache: Main, dumped: Dumped, tmp_path: Path) -> Path:
    """Caches derived from the tiny teacher's dumps, below a folder."""
    corpus = tmp_path / "other.txt"
    corpus.write_text(corpus_text(20, first=500))
    line = ["dump", "--teacher", dumped.teacher, "--corpus", corpus, "--block-length", 32, "--device", "cpu"]
    assert logitcache(*line, "--select", "sample:20", "--out", tmp_path / "other").status == 0
    assert logitcache("derive", dumped.sample, "--select", "sample:12", "--out", tmp_path / "one").status == 0
    assert logitcache("derive", tmp_path / "other", "--select", "sample:12", "--out", tmp_path / "two").status == 0
    assert logitcache("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both").status == 0
    first, last = open_cache(tmp_path / "one").num_blocks - 1, open_cache(tmp_path / "both").num_blocks - 1
    # Both corpora end inside a block: the one short block comes first, the other in the middle.
    picked = f"{last},0:20,{first - 3}:{last}"
    assert logitcache("subset", tmp_path / "both", "--blocks", picked, "--out", tmp_path / "part").status == 0
    return tmp_path


def test_a_student_learns_from_it(logitcache: Main, made: Path) -> None:
    """Short blocks at the front and in the middle; the tokenizer is found where the first dump's teacher is."""
    assert len(open_cache(made / "part").manifest.identity.geometry.short_blocks) == 2
    checked = logitcache("verify", made / "part")
    assert (checked.status, checked.err) == (0, "")
    student = student_yaml(made / "student.yaml")
    line = ["train", "--cache", made / "part", "--student", student, "--out", made / "run", "--batch-tokens", 64]
    ran = logitcache(*line, "--max-steps", 6, "--device", "cpu", "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["eval_ce"] < 7
    assert (made / "run" / "tokenizer.json").exists()


def test_what_is_shown_of_it(logitcache: Main, dumped: Dumped, made: Path) -> None:
    facts = json.loads(logitcache("inspect", made / "part", "--json").out)
    assert [step["operation"] for step in facts["ancestry"]] == ["derive", "derive", "merge", "subset"]
    assert facts["ancestry"][0]["parents"] == [open_cache(dumped.sample).fingerprint]
    shown = logitcache("inspect", made / "part").out
    assert "derive from=sample:20 seed=0 select=sample:12 of " in shown
    assert f"merge blocks={open_cache(made / 'one').num_blocks},{open_cache(made / 'two').num_blocks} of " in shown


def test_every_position_is_the_dump_s(logitcache: Main, dumped: Dumped, made: Path) -> None:
    """`inspect --position` counts real tokens, over short blocks; the text is that of the dumped block."""
    part, dump = open_cache(made / "part"), open_cache(dumped.sample)
    first = int(part.read_blocks(0, 1).valid.sum())
    for position, block, place in ((first - 1, 0, first - 1), (first, 1, 0), (first + 33, 2, 1)):
        facts = json.loads(logitcache("inspect", made / "part", "--position", position, "--json").out)
        assert (facts["block"], facts["place"]) == (block, place)
    facts = json.loads(logitcache("inspect", made / "part", "--position", first + 5, "--json").out)
    expected = json.loads(logitcache("inspect", dumped.sample, "--position", 5, "--json").out)
    for name in ("context", "next_id", "label_logprob", "entropy"):
        assert facts[name] == expected[name]
    last = part.num_tokens - 1
    assert json.loads(logitcache("inspect", made / "part", "--position", last, "--json").out)["position"] == last
    refused = logitcache("inspect", made / "part", "--position", last + 1)
    assert refused.status == 2
    assert dump.num_tokens > part.num_tokens
