"""`dump --teacher URL` on the command line: what is refused before the first unit, and that no key is ever shown."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Main
from tests.teachers.serving import Serving
from tests.test_dump import write_corpus
from tests.tiny import save_tiny, tiny_tokenizer

KEY = "sk-a-key-that-nobody-may-see"


@pytest.fixture
def line(server: Serving, served_model: Path, tmp_path: Path) -> list[Any]:
    """A good line."""
    write_corpus(tmp_path / "corpus")
    given = {"teacher": server.url, "tokenizer": served_model, "corpus": tmp_path / "corpus", "out": tmp_path / "out"}
    given |= {"select": "top-k:7", "block_length": 13, "unit_tokens": 104}
    return ["dump", *(part for name, value in given.items() for part in ("--" + name.replace("_", "-"), value))]


def changed(line: list[Any], option: str, value: Any) -> list[Any]:
    """The line with an option set to something else, or added."""
    if option not in line:
        return [*line, option, value]
    place = line.index(option) + 1
    return [*line[:place], value, *line[place + 1 :]]


def test_a_dump_and_a_look_at_it(logitcache: Main, line: list[Any], tmp_path: Path) -> None:
    """The tokenizer is found again by itself; the entropy is not known."""
    ran = logitcache(*line, "--concurrency", 3, "--requests-per-second", 500, "--request-timeout", 60, "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["caches"][0]["select"] == "top-k:7"
    assert logitcache(*line).out.count("Nothing was left to compute.") == 1
    shown = logitcache("inspect", tmp_path / "out", "--position", 5, "--json")
    facts = json.loads(shown.out)
    assert facts["entropy"] is None
    assert len(facts["teacher"]) == 7
    assert "showing ids only" not in shown.err


@pytest.mark.parametrize(
    ("settings", "change", "status", "said"),
    [
        ({}, ("--teacher", "http://127.0.0.1:9/v1"), 1, r"127\.0\.0\.1:9/v1 cannot be reached .*server runs$"),
        ({}, ("--teacher", "http://127.0.0.1:{port}"), 1, r"/models lists no models \(answers 404 .*ends in /v1"),
        ({}, ("--teacher", "ftp://host/v1"), 2, "is no http:// or https:// URL"),
        ({}, ("--teacher", "http://me:secret@127.0.0.1:9/v1"), 2, "holds more than host, port and path"),
        ({}, ("--teacher", "http://127.0.0.1:9/v1?key=secret"), 2, "holds more than host, port and path"),
        ({"key": KEY}, None, 1, "answers 401: it wants a key in LOGITCACHE_API_KEY"),
        ({"names": ["a", "b"]}, None, 2, "serves several models; choose one with --teacher-model: a, b$"),
        ({"names": ["a", "b"]}, ("--teacher-model", "c"), 1, "serves a, b, not c; choose with --teacher-model"),
        ({"names": []}, None, 1, "serves no model; start it with one"),
        ({"flavour": "none"}, None, 1, "does not tell the log-probabilities of a prompt's tokens by their ids: with"),
        ({"flavour": "text"}, None, 1, "with OpenAI's echo and logprobs it names tokens by their text"),
        ({"spoil": "html"}, None, 1, "it answers 200 with something that is not JSON"),
        ({}, ("--tokenizer", "{other}"), 1, "reads other text from the tokenizer's ids .* with --tokenizer"),
        ({"flavour": "echo"}, ("--tokenizer", "{other}"), 1, "reads other text from the tokenizer's ids"),
        ({"flavour": "sglang"}, ("--tokenizer", "{other}"), 1, "reads other text from the tokenizer's ids"),
        ({}, ("--tokenizer", "{smaller}"), 1, "it names an id outside a vocabulary of 290; give that model's own"),
        ({}, ("--tokenizer", "{larger}"), 1, r"has not the tokenizer's vocabulary: it answers 400 .*out of vocab"),
        ({}, ("--select", "top-k:41"), 1, r"does not give 41 .*greater than max allowed: 40.* --max-logprobs 41"),
        ({}, ("--select", "top-k:301"), 2, "keeps 301 ids, but the teacher's vocabulary has 300"),
        ({}, ("--select", "sample:9"), 1, r"sample:9 draws from the whole distribution, .*would be biased; choose"),
        ({}, ("--select", "varopt:9"), 1, r"varopt:9 draws from the whole distribution, .*max allowed: 40"),
        ({"spoil": "forget"}, None, 1, "answers once, but asked the same again it leaves a position out.*caching"),
        ({"spoil": "noise"}, None, 1, r"gives one question answers that are 0\.50 nats apart"),
        ({"spoil": "counted"}, None, 1, "it counts the token that was sent as one of them"),
        ({}, ("--block-length", 127), 1, "context of 128, as 2 more are needed; choose a block length of at most 126"),
        ({"tells_context": False}, ("--block-length", 127), 1, r"not take a block of 127 tokens .* 400 \(This model"),
        ({}, ("--tokenizer", "{nowhere}"), 1, "nowhere"),
        ({}, ("--concurrency", 0), 2, "concurrency is 0"),
        ({}, ("--dtype", "float32"), 2, "--dtype says how a teacher runs here"),
    ],
)
def test_one_sentence_before_the_first_unit(
    logitcache: Main,
    server: Serving,
    line: list[Any],
    tmp_path: Path,
    settings: dict[str, Any],
    change: tuple[str, str] | None,
    status: int,
    said: str,
) -> None:
    server.set(**settings)
    if change is not None:
        save_tiny(tmp_path / "smaller", vocab_size=290)
        tiny_tokenizer(bos=True).save_pretrained(tmp_path / "other")
        tiny_tokenizer(310).save_pretrained(tmp_path / "larger")
        folders = {name: tmp_path / name for name in ("smaller", "larger", "other", "nowhere")}
        line = changed(line, change[0], str(change[1]).format(port=server.port, **folders))
    ran = logitcache(*line)
    assert ran.status == status
    assert re.search(said, ran.sentence), ran.sentence
    assert "secret" not in ran.err
    assert not list((tmp_path / "out").rglob("*.json"))


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({}, 0),
        ({"key": "another"}, 1),
        ({"faults": [{}, {}, {}, {}, {}, {"status": 400}]}, 1),
        ({"faults": [{}, {}, {}, {}, {}, *[{"status": 503, "retry_after": "0"}] * 50]}, 1),
        ({"most": 3}, 1),
    ],
)
def test_the_key_is_sent_and_never_shown(
    logitcache: Main,
    server: Serving,
    line: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    status: int,
) -> None:
    """Even by a server that repeats it in its errors, with every log switched on."""
    monkeypatch.setenv("LOGITCACHE_API_KEY", KEY)
    monkeypatch.setenv("LOGITCACHE_DEBUG", "1")
    server.set(**{"key": KEY, **settings})
    with caplog.at_level(logging.DEBUG):
        ran = logitcache(*line)
    assert ran.status == status
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 2 or status
    for said in (ran.out, ran.err, caplog.text, *(data.decode("latin-1") for data in written)):
        assert KEY not in said
    if settings.get("faults") or "most" in settings:
        assert "Bearer ***" in ran.err
    if settings.get("key") == "another":
        assert "answers 401: the key in LOGITCACHE_API_KEY is not accepted" in ran.err


@pytest.mark.parametrize("key", ["two words", "schlüssel", "line\nbreak"])
def test_a_key_that_cannot_be_sent(
    logitcache: Main, line: list[Any], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("LOGITCACHE_API_KEY", key)
    ran = logitcache(*line)
    assert ran.status == 2
    assert "LOGITCACHE_API_KEY holds a space" in ran.sentence
    assert key not in ran.err


def test_bench_needs_a_teacher_that_runs_here(logitcache: Main, server: Serving, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    ran = logitcache("bench", "storage", "--teacher", server.url, "--corpus", tmp_path, "--out", tmp_path / "out")
    assert ran.status == 2
    assert "which a server does not tell" in ran.sentence
