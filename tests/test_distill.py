"""run_training: equal runs, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcache import models
from logitcache.errors import TrainingError
from logitcache.training.options import TrainOptions
from tests.caches import BLOCK_LENGTH, Dumped, corpus_text, dump_orphan, student_yaml
from tests.runs import losses_of, rows_of, weights_of
from tests.short_runs import STEPS, assert_same_run, eight_steps, train
from tests.tiny import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def values(dumped: Dumped, unsteady_student: Path, tmp_path: Path) -> dict[str, Any]:
    return eight_steps(dumped, unsteady_student, tmp_path / "out")


def test_equal_runs_are_equal(values: dict[str, Any], tmp_path: Path) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    results = [train(values, out=str(out)) for out in outs]
    assert_same_run(*outs)
    assert results[0].keys() == {
        "eval_ce", "eval_ece", "eval_kl", "eval_tokens", "eval_top1", "steps", "tokens", "tokens_per_second",
    }  # fmt: skip
    assert (results[0]["steps"], results[0]["tokens"]) == (STEPS, STEPS * 4 * BLOCK_LENGTH)
    steps = [row["step"] for row in rows_of(outs[0]) if "loss" in row]
    assert steps == [2, 4, 6, 8]
    assert [row["step"] for row in rows_of(outs[0]) if "eval_ce" in row] == [4, 8]


def test_another_seed_is_another_run(values: dict[str, Any], tmp_path: Path) -> None:
    for seed in (0, 1):
        train(values, out=str(tmp_path / str(seed)), seed=seed, max_steps=2)
    losses = [rows_of(tmp_path / str(seed))[0]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_the_student_loads_with_transformers(values: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    steps = []
    train(values, progress=lambda step, total, metrics: steps.append((step, total)))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert {step for step, _ in steps} == set(range(1, STEPS + 1))
    out = Path(values["out"])
    student, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert student.config.vocab_size == 300
    assert student.config.eos_token_id == tokenizer.eos_token_id == 0
    ids = tokenizer("Line 3 says", return_tensors="pt")["input_ids"]
    assert student.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert (out / "loss.png").stat().st_size > 5000
    record = json.loads((out / "run.json").read_text())
    assert TrainOptions.build(record["options"]) == TrainOptions.build(values)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_students_of_other_families(family: str, values: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2: learned positions and tied weights. Gemma 2: soft-capped logits."""
    fields = {key: value for key, value in FAMILIES[family].items() if key != "initializer_range"}
    config = tmp_path / "other.json"
    config.write_text(json.dumps({"model_type": family, **fields}))
    train(values, student=str(config), max_steps=12)
    losses = losses_of(Path(values["out"]))
    assert losses[-1] < losses[0]
    assert models.load_model(values["out"], device="cpu").config.model_type == family


@pytest.mark.parametrize(
    ("cache", "changes"),
    [
        ("top_k", {"tail": "bucket"}),
        ("top_k", {"tail": "renormalised", "temperature": 2.0}),
        ("sample", {}),
        ("top_k", {"objective": "cross-entropy"}),
        ("sample", {"alpha_schedule": "linear", "lr_schedule": "wsd"}),
        ("varopt", {"tail": "blend", "blend": 0, "blend_end": 1, "z_loss": 1e-3}),
        ("varopt", {"objective": "skew-kl"}),
        ("sample", {"mask": "teacher-entropy:0.85"}),
        ("top_k", {"mask": "student-entropy:0.5", "mask_rest": "nothing"}),
        ("top_k", {"objective": "decoupled", "temperature": 2.0}),
    ],
)
def test_objectives(cache: str, changes: dict[str, Any], values: dict[str, Any], dumped: Dumped) -> None:
    """Each falls, on the training blocks and on those held out."""
    result = train(values, cache=str(getattr(dumped, cache)), max_steps=24, **changes)
    rows = rows_of(Path(values["out"]))
    assert ("divergence" in rows[0]) == (changes.get("objective") != "cross-entropy")
    shares = [row["blend"] for row in rows if "blend" in row]
    assert shares[-1:] == ([1] if changes.get("tail") == "blend" else [])
    assert ("z_loss" in rows[0]) == ("z_loss" in changes)
    assert ("kept" in rows[0]) == ("mask" in changes)
    losses = [row["ce"] for row in rows if "ce" in row]
    assert losses[-1] < losses[0] - 0.1
    first = next(row["eval_ce"] for row in rows if "eval_ce" in row)
    assert result["eval_ce"] < first


def test_a_student_from_a_folder(values: dict[str, Any], dumped: Dumped) -> None:
    """The teacher itself as the student begins where it cannot get better."""
    train(values, student=str(dumped.teacher), max_steps=2, learning_rate=1e-9)
    assert rows_of(Path(values["out"]))[0]["divergence"] < 1e-3


def test_weights_are_float32_whatever_the_config_says(values: dict[str, Any], tmp_path: Path) -> None:
    train(values, student=str(student_yaml(tmp_path / "half.yaml", dtype="bfloat16")), max_steps=2)
    assert {value.dtype for value in weights_of(Path(values["out"])).values()} == {torch.float32}


def test_a_run_that_diverges_ends_with_an_error(values: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"is nan at step .: training diverged"):
        train(values, learning_rate=1e30)
    out = Path(values["out"])
    assert not (out / "model.safetensors").exists()
    assert not (out / "result.json").exists()


def test_a_last_step_that_diverges(values: dict[str, Any]) -> None:
    """Nothing that is measured sees what it did to the weights."""
    with pytest.raises(TrainingError, match=r"the weight .* is not finite after step 1: training diverged"):
        train(values, held_out=0, max_steps=1, learning_rate=1e38, warmup=0)
    assert not (Path(values["out"]) / "model.safetensors").exists()


def test_held_out_cache_and_other_domain(values: dict[str, Any], dumped: Dumped, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text(corpus_text(20, first=500))
    result = train(values, held_out_cache=str(dumped.sample), eval_text=str(text), max_steps=2)
    assert {"eval_other_ce", "eval_other_ece", "eval_ce", "eval_kl"} <= result.keys()
    assert 3 < result["eval_other_ce"] < 6


def test_nothing_held_out(values: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is logged of evaluations of nothing; text of another domain is evaluated all the same, and once."""
    result = train(values, held_out=0, max_steps=2, eval_every=1)
    assert not any(name.startswith("eval_") for name in result)
    assert [row["step"] for row in rows_of(Path(values["out"]))] == [2]
    text = tmp_path / "other.txt"
    text.write_text(corpus_text(20, first=500))
    out = values["out"] + "-text"
    result = train(values, held_out=0, eval_text=str(text), max_steps=2, eval_every=1, out=out)
    evaluated = [row for row in rows_of(Path(out)) if "eval_other_ce" in row]
    assert [row["step"] for row in evaluated] == [1, 2]
    assert result["eval_other_ce"] == evaluated[-1]["eval_other_ce"]


def test_length_of_a_run(values: dict[str, Any]) -> None:
    """103 training blocks of 108 in batches of 4; the last of epochs, max_tokens and max_steps wins."""
    del values["max_steps"]
    for changes, steps in (({}, 26), ({"epochs": 0.2}, 5), ({"epochs": 3, "max_tokens": 1024}, 8)):
        options = values | changes | {"out": values["out"] + str(steps), "log_every": 100}
        assert train(options)["steps"] == steps


def test_a_cache_without_its_teacher_trains(values: dict[str, Any], dumped: Dumped, tmp_path: Path) -> None:
    """No tokenizer is saved then; with --tokenizer it is."""
    cache = str(dump_orphan(tmp_path, dumped))
    train(values, cache=cache, max_steps=2)
    assert not (Path(values["out"]) / "tokenizer.json").exists()
    train(values, cache=cache, max_steps=2, tokenizer=str(dumped.teacher), out=values["out"] + "2")
    assert (Path(values["out"] + "2") / "tokenizer.json").exists()
