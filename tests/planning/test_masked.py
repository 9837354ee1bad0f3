"""Plans of corpora of which only a part is learnt, and of caches of labels only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.corpus import expand_paths
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.planning import PlanOptions, make_plan, sample
from logitcache.selection import Selection
from logitcache.store import open_cache
from tests.caches import corpus_text, student_yaml
from tests.corpus.files import write_records
from tests.tiny import tiny_tokenizer

PAIRS = {"prompt_field": "prompt", "completion_field": "completion"}


def records(count: int) -> list[dict[str, Any]]:
    """Prompts of one to three lines, completions of one; each also as a conversation, and some ids with a mask."""
    found, lines = [], np.random.default_rng(0).integers(1, 4, count).tolist()
    for number in range(count):
        prompt = corpus_text(lines[number], number) + "Again:"
        completion = " " + corpus_text(1, 2 * number)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        ids = [number % 250 + 1, 7, 30, 40, 50]
        found.append(
            {"prompt": prompt, "completion": completion, "messages": messages, "ids": ids, "mask": [0, 0, 1, 1, 0]}
        )
    return found


def dump_options(place: Path, folder: Path, corpus: Path, specs: tuple[str, ...], **changes: Any) -> DumpOptions:
    outputs = tuple(Output(Selection.parse(spec), folder / str(number)) for number, spec in enumerate(specs))
    return DumpOptions(str(place / "teacher"), (str(corpus),), outputs, device="cpu", block_length=64, **changes)


def test_a_masked_corpus_and_labels(place: Path, tmp_path: Path) -> None:
    corpus = write_records(tmp_path, "jsonl", records(240))
    specs = ("top-k:8", "sample:20", "label")
    options = dump_options(place, tmp_path / "out", corpus, specs, **PAIRS)
    plan = make_plan(PlanOptions(options, together=True, codecs=("small",), sample_tokens=3200))
    report = run_dump(options)
    assert (plan.corpus.tokens, plan.corpus.whole) == (report.tokens, False)
    assert report.tokens > 8 * plan.corpus.sample_tokens
    for cache, output in zip(plan.caches, options.outputs, strict=True):
        real = open_cache(output.root)
        assert 0.2 < real.num_counted / real.num_tokens < 0.6
        assert cache.bytes == pytest.approx(real.num_bytes, rel=0.05), cache.select
    label = plan.caches[-1]
    assert (label.gradient_angle, label.gradient_variance) == (None, None)
    assert all(cache.gradient_angle for cache in plan.caches[:-1])
    assert plan.notes[-1:] == ["the angle is that of all positions, of prompts, too"]


@pytest.mark.parametrize(
    "fields", [{"messages_field": "messages"}, {"ids_field": "ids", "mask_field": "mask"}], ids=["messages", "ids"]
)
def test_a_sample_of_everything_is_exact(place: Path, tmp_path: Path, fields: dict[str, str]) -> None:
    corpus = write_records(tmp_path, "jsonl", records(60))
    options = dump_options(place, tmp_path / "out", corpus, ("label",), max_tokens=280, **fields)
    student = str(student_yaml(tmp_path / "student.yaml"))
    plan = make_plan(PlanOptions(options, ("small",), together=True, student=student))
    assert plan.corpus.whole
    assert plan.gradient_positions == 0
    assert plan.caches[0].reader_bytes_per_second
    run_dump(options)
    assert plan.caches[0].bytes == pytest.approx(open_cache(tmp_path / "out" / "0").num_bytes, abs=32)


@pytest.mark.parametrize("kind", ["jsonl", "arrow", "stream.arrow"])
def test_windows_have_their_share_of_completions(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    corpus = write_records(tmp_path, kind, records(400))
    options = dump_options(place, tmp_path / "out", corpus, ("label",), **PAIRS)
    tokenizer = tiny_tokenizer()
    whole = sample._Text(options, tokenizer, 300).pack(expand_paths([corpus]), None)
    monkeypatch.setattr(sample, "EXACT_BYTES", 100)
    monkeypatch.setattr(sample, "EXACT_TOKENS", 100)
    taken = sample.take_sample(options, tokenizer, 300, 6400)
    assert taken.corpus.masked
    assert not taken.whole
    assert taken.total_tokens == pytest.approx(whole.num_tokens, rel=0.05)
    learnt_BL = taken.corpus.blocks.learnt_BL
    assert learnt_BL is not None
    assert learnt_BL.mean() == pytest.approx(whole.learnt_tokens / whole.num_tokens, rel=0.1)
    # What is counted is what the next token says.
    counted_BL = taken.corpus.read_counted(2, 5)
    assert counted_BL is not None
    np.testing.assert_array_equal(counted_BL[:, :-1], learnt_BL[2:5, 1:])
    assert not counted_BL[:, -1].any()
