"""`dump` of prompts with completions, and what the other commands say of such a cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from logitcache.store import open_cache
from tests.cli.conftest import Main
from tests.corpus.files import write_records
from tests.rollouts import LENGTH, pairs
from tests.tiny import save_tiny


def test_the_command_line(tmp_path: Path, logitcache: Main) -> None:
    root, corpus = tmp_path / "cache", write_records(tmp_path, "jsonl", pairs(12))
    save_tiny(tmp_path / "teacher")
    ran = logitcache(
        "dump", "--teacher", tmp_path / "teacher", "--corpus", corpus, "--prompt-field", "prompt",
        "--completion-field", "completion", "--select", "label", "--out", root, "--block-length", LENGTH, "--json",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["caches"][0]["select"] == "label"
    read = json.loads(ran.out)["corpus"]
    facts = json.loads(logitcache("inspect", root, "--json").out)
    cache = open_cache(root)
    assert read == {
        "tokens": cache.num_tokens,
        "uncertainty": 0.0,
        "files": 1,
        "bytes": corpus.stat().st_size,
        "documents": len(corpus.read_text().splitlines()),
        "counted": cache.num_counted,
    }
    assert (facts["select"], facts["counted tokens"], facts["ids per token"]) == ("label", cache.num_counted, 0.0)
    blocks = cache.read_blocks(0, cache.num_blocks)
    assert blocks.counted is not None
    position = int(np.flatnonzero(blocks.counted)[0])
    shown = json.loads(logitcache("inspect", root, "--position", position, "--json").out)
    assert (shown["counted"], shown["teacher"], shown["entries"]) == (True, [], 0)
    assert shown["label_logprob"] == blocks.targets.label_logprob[position]
    assert "next token in the text" in logitcache("inspect", root, "--position", position).out
    assert "the next token is not one to learn" in logitcache("inspect", root, "--position", "0").out
    block = json.loads(logitcache("inspect", root, "--block", "0", "--json").out)
    assert block["counted"] == blocks.counted[0].sum()
    empty = int((~blocks.counted.any(1)).argmax())
    shown = logitcache("inspect", root, "--block", empty).out
    assert "nothing is stored of this block" in shown
    assert "nan" not in shown
    assert logitcache("verify", root).status == 0
    wrong = logitcache(
        "dump", "--teacher", tmp_path / "teacher", "--corpus", corpus, "--prompt-field", "prompt",
        "--select", "label", "--out", tmp_path / "no",
    )  # fmt: skip
    assert wrong.status == 2
    assert "a prompt field and a completion field need each other; give both" in wrong.sentence
    missing = logitcache(
        "dump", "--teacher", tmp_path / "teacher", "--corpus", corpus, "--ids-field", "ids",
        "--select", "label", "--out", tmp_path / "no", "--block-length", LENGTH,
    )  # fmt: skip
    assert missing.status == 1
    assert "records.jsonl:1 has no field 'ids'; it has 'prompt', 'completion'" in missing.sentence
