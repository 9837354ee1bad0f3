"""What `logitcache train` refuses before its first step: exit status, one sentence with both sides of it, no --out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitcache import models
from logitcache.cli.train import EXAMPLE
from logitcache.cli.train import train as train_command
from logitcache.kernels import triton_kernels
from logitcache.store import open_cache
from logitcache.training.options import SET_ONLY, TrainOptions
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
        "text.txt:2: there is no option 'save_evry'; did you mean 'save_every'?",
        lambda r, d: train(r, d, config=file(r, "alpha: 0.5\nsave-evry: 3\n")),
    ),
    "a value in a --config": (
        2,
        "text.txt:3: batch_tokens is 'many'; it must be a valid integer",
        lambda r, d: train(r, d, config=file(r, "# sizes\n\nbatch-tokens: many\n")),
    ),
    "a --config that is no YAML": (
        2,
        "text.txt:2: this is not YAML (mapping values are not allowed here); write one `key: value` a line",
        lambda r, d: train(r, d, config=file(r, "alpha: 0.5\n  seed: 3\n")),
    ),
    "an option over a --config": (
        2,
        "--batch-tokens is 0; it must be greater than or equal to 1",
        lambda r, d: train(r, d, config=file(r, "batch-tokens: many\n"), batch_tokens=0),
    ),
    "--set out of range": (
        2,
        "--set warmup is 2; it must be less than or equal to 1",
        lambda r, d: [*train(r, d), "--set", "warmup=2"],
    ),
    "weights": (
        2,
        "--cache-weights 1.0,-1.0 makes no shares; give each cache a number above 0",
        lambda r, d: [*train(r, d), "--cache", d.dense, "--cache-weights", "1,-1"],
    ),
    "an option of another objective": (
        2,
        "--objective forward-kl has no --beta, but --beta is 0.3; leave it out",
        lambda r, d: train(r, d, beta=0.3),
    ),
    "a tail that the cache cannot give": (
        1,
        "--tail unbiased needs sampled targets, but these hold probabilities of top-k or top-p; use --tail bucket, or",
        lambda r, d: train(r, d, tail="unbiased"),
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


def test_an_implementation_that_cannot_run_here(
    logitcache: Main, dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the run's folder is made, which would be in the way of the next try."""
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    ran = logitcache(*train(tmp_path, dumped), "--set", "impl=triton")
    assert ran.status == 2
    assert ran.sentence == "error: --set impl=triton needs a CUDA device, but the device is cpu; use --set impl=split"
    assert not (tmp_path / "out").exists()


def test_keys_without_an_option() -> None:
    """Messages tell which option a key is, or that --set takes it; so does the help."""
    options = {parameter.name for parameter in train_command.params}
    assert TrainOptions.model_fields.keys() - options == SET_ONLY
    assert all(f"{key}," in EXAMPLE or f"{key}." in EXAMPLE for key in SET_ONLY)


def test_a_batch_larger_than_what_is_trained_on(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    ran = logitcache(*train(tmp_path, dumped, batch_tokens=4096), "--set", "accumulate=2")
    assert ran.status == 0
    said = (
        "train: one step takes 256 blocks of 32 tokens, but there are only 103 to train on, so it reads blocks more "
        "than once; use a smaller --batch-tokens than 4096 and --set accumulate=2\n"
    )
    assert said in ran.err
    small = logitcache(*train(tmp_path, dumped, batch_tokens=3296, out=tmp_path / "small"))
    assert small.status == 0
    assert "one step takes" not in small.err


def test_a_batch_smaller_than_a_block(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    ran = logitcache(*train(tmp_path, dumped, batch_tokens=31), "--json")
    assert ran.status == 0
    said = (
        "train: a batch is a whole block of 32 tokens, the least that the cache's blocks allow, and not the 31 tokens "
        "of --batch-tokens\n"
    )
    assert ran.err.count(said) == 1
    assert json.loads(ran.out)["tokens"] == 32 * json.loads(ran.out)["steps"]
    whole = logitcache(*train(tmp_path, dumped, batch_tokens=32, out=tmp_path / "whole"), "--json")
    assert "a whole block" not in whole.err
    assert json.loads(whole.out)["eval_ce"] == json.loads(ran.out)["eval_ce"]


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
