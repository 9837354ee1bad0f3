"""Samples of corpora that are too large to be tokenised: spread over all of it, and the size that follows."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcache.corpus import expand_paths
from logitcache.dump import DumpOptions
from logitcache.errors import CorpusError
from logitcache.planning import planned_outputs, sample, windows
from logitcache.selection import Selection
from tests.caches import corpus_text
from tests.tiny import tiny_tokenizer

LINES = 3000


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "EXACT_BYTES", 100)
    monkeypatch.setattr(sample, "EXACT_TOKENS", 100)


def options(path: Path, **changes: object) -> DumpOptions:
    outputs = planned_outputs([Selection.parse("top-k:4")])
    return DumpOptions("unused", (str(path),), outputs, block_length=64, **changes)


def write(folder: Path, kind: str) -> Path:
    """The same documents of a line each as files of a kind, two of them."""
    lines = corpus_text(LINES).splitlines()
    for name, part in (("a", lines[: LINES // 3]), ("b", lines[LINES // 3 :])):
        path = folder / f"{name}.{kind}"
        records = "".join(json.dumps({"text": line}) + "\n" for line in part)
        if kind == "txt":
            path.write_text("".join(f"{line} zażółć\n" for line in part))
        elif kind == "jsonl":
            path.write_text(records)
        elif kind == "jsonl.gz":
            path.write_bytes(gzip.compress(records.encode()))
        else:
            pq.write_table(pa.table({"text": part}), path, row_group_size=500)
    return folder


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_the_size_of_the_whole_follows(tmp_path: Path, kind: str) -> None:
    tokenizer = tiny_tokenizer()
    given = options(write(tmp_path, kind))
    real = sample._Text(given, tokenizer, 300).pack(expand_paths(given.corpus), None).num_tokens
    taken = sample.take_sample(given, tokenizer, 300, 640)
    assert taken.total_tokens == pytest.approx(real, rel=0.05)
    assert not taken.whole
    assert 0 < taken.uncertainty < 0.2
    assert taken.corpus.blocks.tokens_BL.shape == (10, 64)
    assert taken.corpus.num_tokens == 640
    if kind != "jsonl.gz":
        # A line says its number: they come from all parts of the corpus, in its order.
        texts = [tokenizer.decode(block) for block in taken.corpus.blocks.tokens_BL]
        numbers = [int(found[1]) for text in texts if (found := re.search(r"Line (\d+) says", text))]
        assert numbers == sorted(numbers)
        assert numbers[0] < LINES / 8
        assert numbers[-1] > LINES * 7 / 8


def test_only_the_beginning_is_sampled(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    taken = sample.take_sample(options(write(tmp_path, "jsonl"), max_tokens=12_000), tokenizer, 300, 640)
    assert (taken.total_tokens, taken.uncertainty) == (12_000, 0)
    text = tokenizer.decode(taken.corpus.blocks.tokens_BL.reshape(-1))
    numbers = [int(number) for number in re.findall(r"Line (\d+) says", text)]
    assert 250 < max(numbers) < 600


def test_windows_are_whole_characters_and_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("数字€ß𝄞" * 500)
    (tmp_path / "b.jsonl").write_text('{"text": "€uro"}\n' * 500)
    files = expand_paths([tmp_path])
    cut = windows.cut_windows(files, tmp_path, 40, 50, sum(windows.file_sizes(files)))
    assert len(cut) == 40
    for window in cut:
        data = window.file.path.read_bytes()
        assert window.bytes == len(data) > 0
        text = data.decode()
        assert window.source.name == window.file.name
        if window.source.name == "b.jsonl":
            assert [json.loads(line) for line in text.splitlines()] == [{"text": "€uro"}] * text.count("\n")


def test_errors_name_the_corpus(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 " * 2000)
    with pytest.raises(CorpusError, match=r"^a part of .*a\.txt is not UTF-8 at byte offset \d+"):
        sample.take_sample(options(path), tiny_tokenizer(), 300, 640)
    path.write_text(" \n" * 2000)
    with pytest.raises(CorpusError, match="no text was found in a sample of the corpus"):
        sample.take_sample(options(path), tiny_tokenizer(), 300, 640)
    path.write_bytes(b"")
    with pytest.raises(CorpusError, match="the corpus is empty"):
        sample.take_sample(options(path), tiny_tokenizer(), 300, 640)
