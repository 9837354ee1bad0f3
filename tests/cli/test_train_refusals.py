"""What `logitcache train` refuses before its first step: exit status, one sentence with both sides of it, no --out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitcache import models
from logitcache.store import open_cache
from logitcache.training.records import COMPLETE
from tests.caches import Dumped, student_yaml
from tests.cli.conftest import Main
from tests.cli.test_bad_input import file, train
from tests.store.caches import files_of
from tests.tiny import save_tiny, tiny_tokenizer

Line = Callable[[Path, Dumped], list[Any]]


def hashes(dumped: Dumped) -> tuple[str, str]:
    """Of the cache's tokenizer and of another, as messages show them."""
    cached = open_cache(dumped.top_k).manifest.identity.tokenizer["sha256"]
    return cached[:12], models.tokenizer_identity(tiny_tokenizer(290))["sha256"][:12]


def stranger(root: Path) -> Path:
    """A model folder with another tokenizer, as large as the cache's."""
    models.save_model(
        models.load_model(save_tiny(root / "stranger"), device="cpu"), root / "stranger", tiny_tokenizer(290)
    )
    return root / "stranger"


def small(root: Path) -> Path:
    return save_tiny(root / "small", vocab_size=270, with_tokenizer=False)


CASES: dict[str, tuple[int, str, Line]] = {
    "student's tokenizer": (
        1,
        "stranger has a tokenizer with hash {other}, the cache was made with {mine}; use a student with the teacher's",
        lambda r, d: train(r, d, student=stranger(r)),
    ),
    "tokenizer": (
        1,
        "the tokenizer has hash {other}, the cache was made with {mine}; give the teacher's tokenizer with --tokenizer",
        lambda r, d: train(r, d, tokenizer=stranger(r)),
    ),
    "vocabulary of a folder": (
        1,
        "small has a vocabulary of 270 ids, the cache holds ids up to 299; use a student of at least 300 ids",
        lambda r, d: train(r, d, student=small(r)),
    ),
    "vocabulary of a config": (
        1,
        "s.yaml has a vocabulary of 299 ids, the cache holds ids up to 299",
        lambda r, d: train(r, d, student=student_yaml(r / "s.yaml", vocab_size=299)),
    ),
    "a key of the config": (
        1,
        "has a key 'hiden_size' that a 'llama' config does not have; did you mean 'hidden_size'?",
        lambda r, d: train(r, d, student=student_yaml(r / "s.yaml", hiden_size=8)),
    ),
    "no options": (2, "--cache is missing; give it here or as `cache` in a --config file", lambda r, d: ["train"]),
    "an out inside the cache": (
        2,
        "lies inside the cache",
        lambda r, d: train(r, d, out=d.top_k / "run"),
    ),
    "--set": (
        2,
        "there is no option 'learning_rte'; did you mean 'learning_rate'?",
        lambda r, d: [*train(r, d), "--set", "learning-rte=0.1"],
    ),
    "--set nothing like it": (
        2,
        "there is no option 'xyzzy'; the keys are accumulate, alpha, alpha_decay",
        lambda r, d: [*train(r, d), "--set", "xyzzy=1"],
    ),
    "--set a key below another": (
        2,
        "there is no option 'alpha.decay'; did you mean 'alpha_decay'?",
        lambda r, d: [*train(r, d), "--set", "alpha.decay=1"],
    ),
    "--config": (
        2,
        "there is no option 'save_evry'; did you mean 'save_every'?",
        lambda r, d: train(r, d, config=file(r, "alpha: 0.5\nsave-evry: 3\n")),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    status, message, line = CASES[name]
    ran = logitcache(*line(tmp_path, dumped))
    mine, other = hashes(dumped)
    assert mine != other
    assert message.format(mine=mine, other=other) in ran.sentence
    assert ran.status == status
    assert not (tmp_path / "out").exists()


def test_a_state_of_another_cache(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    """Another cache in the command line, and another's state in the checkpoint; the run's files stay as they were."""
    line = [*train(tmp_path, dumped), "--set", "save_every=1", "--set", "log_every=1"]
    out = tmp_path / "out"
    assert logitcache(*line).status == 0
    (out / "result.json").unlink()
    before = files_of(out)
    ran = logitcache(*line, "--resume", "--cache", dumped.dense)
    assert ran.status == 1
    assert "the cache's content is another one" in ran.err
    assert files_of(out) == before

    marker = out / "checkpoints" / "checkpoint-2" / COMPLETE
    state = json.loads(marker.read_text())
    marker.write_text(json.dumps({**state, "fingerprints": [open_cache(dumped.dense).fingerprint]}))
    ran = logitcache(*line, "--resume")
    assert ran.status == 1
    assert "the reader state to resume from has fingerprints" in ran.sentence
    assert "resume with the same caches, seed and held-out share, or start a new --out" in ran.sentence
