"""dump -> verify -> inspect -> train with the real teacher on real text, through the command line's own entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import logitcache
from logitcache.demo import other_domain_text, plays, teacher_folder
from logitcache.teachers import TransformersTeacher

pytestmark = pytest.mark.real_teacher
TOKENS, BLOCK = 2048, 256
STUDENT = "model_type: llama\nhidden_size: 64\nintermediate_size: 128\nnum_hidden_layers: 2\nnum_attention_heads: 4\n"


def logitcache_command(*arguments: object) -> str:
    line = [sys.executable, "-m", "logitcache.cli.main", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("real") / "cache"
    top = root.parent / "top"
    facts = json.loads(
        logitcache_command(
            "dump", "--teacher", teacher_folder(), "--corpus", plays()["hamlet"], "--select", "sample:25",
            "--also", "top-k:16", top, "--out", root, "--block-length", BLOCK, "--max-tokens", TOKENS,
            "--batch-tokens", 1024, "--json",
        )
    )  # fmt: skip
    assert facts["computed_tokens"] == TOKENS
    return root


def test_cache_is_whole_and_right(cache: Path) -> None:
    """Stored rows are the teacher's distributions of exactly these positions."""
    assert json.loads(logitcache_command("verify", cache, "--json"))["ok"]
    opened, top = logitcache.open_cache(cache), logitcache.open_cache(cache.parent / "top")
    assert opened.num_tokens == top.num_tokens == TOKENS
    blocks, exact = opened.read_blocks(3, 5), top.read_blocks(3, 5)
    teacher = TransformersTeacher.load(teacher_folder())
    with torch.inference_mode():
        logits = teacher.model(torch.from_numpy(blocks.tokens)).logits.float().flatten(0, 1)
    log_probs = torch.log_softmax(logits, -1)
    labels = torch.from_numpy(blocks.labels().ravel())
    for row in np.random.default_rng(0).choice(2 * BLOCK, 64, replace=False):
        kept = exact.targets.slice(row, row + 1)
        truth = log_probs[row].topk(16)
        assert sorted(truth.indices.tolist()) == kept.ids.tolist()
        stored = np.log(kept.weights) - log_probs[row, kept.ids].numpy()
        assert np.abs(stored).max() < 3 / 32
        assert abs(float(kept.weights.sum()) - float(truth.values.exp().sum())) < 0.02
        if labels[row] >= 0:
            assert abs(blocks.targets.label_logprob[row] - float(log_probs[row, labels[row]])) < 1 / 64
        entropy = float(-(log_probs[row].exp() * log_probs[row]).sum())
        assert abs(blocks.targets.entropy[row] - entropy) < 1 / 64
    # Sampled counts are a fair picture: the teacher's probability of what was drawn, against its expectation sum p^2.
    drawn = blocks.targets
    picked = log_probs[torch.from_numpy(drawn.row_index()), torch.from_numpy(drawn.ids)].exp().numpy()
    expected = float((log_probs.exp() ** 2).sum(1).mean())
    assert abs(float((picked * drawn.weights).sum()) / len(drawn) - expected) < 0.02


def test_inspect_decodes(cache: Path) -> None:
    shown = json.loads(logitcache_command("inspect", cache, "--position", 700, "--json"))
    assert shown["unbiased"]
    assert shown["context"].strip()
    assert sum(entry["weight"] for entry in shown["teacher"]) == pytest.approx(1, abs=1e-6)


def test_student_trains_and_loads(cache: Path) -> None:
    folder = cache.parent
    (folder / "student.yaml").write_text(STUDENT)
    metrics = json.loads(
        logitcache_command(
            "train", "--cache", cache, "--student", folder / "student.yaml", "--out", folder / "run",
            "--batch-tokens", 1024, "--max-steps", 12, "--held-out", 0.25, "--eval-text", other_domain_text(),
            "--set", "eval_tokens=512", "--set", "log_every=3", "--json",
        )
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["ce"] for row in rows if "ce" in row]
    assert losses[-1] < losses[0] - 0.1
    assert metrics["eval_kl"] > 0
    assert (folder / "run" / "loss.png").stat().st_size > 10_000
    student = AutoModelForCausalLM.from_pretrained(folder / "run")
    # The reported held-out cross entropy is what the saved model itself says of the same blocks.
    opened = logitcache.open_cache(cache)
    held_out = opened.read_blocks(opened.num_blocks - 2, opened.num_blocks)
    with torch.inference_mode():
        logits = student(torch.from_numpy(held_out.tokens)).logits
    labels = torch.from_numpy(held_out.labels())
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(own) == pytest.approx(metrics["eval_ce"], abs=1e-3)
