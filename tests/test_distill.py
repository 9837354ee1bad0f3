"""run_training: equal runs, kills and resumes, what it leaves, and what it refuses before the first step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcache import models
from logitcache.distill import run_training
from logitcache.errors import LogitcacheError, TrainingError, UsageError
from logitcache.training.options import TrainOptions
from logitcache.training.records import COMPLETE
from tests.caches import BLOCK_LENGTH, Dumped, corpus_text, random_cache, student_yaml
from tests.faults import forkserver, start
from tests.runs import assert_same_weights, losses_of, result_of, rows_of, weights_of
from tests.tiny import FAMILIES, save_tiny, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 8
Child = Callable[..., int]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its dropout makes every step depend on the state of the random number generator."""
    return student_yaml(tmp_path_factory.mktemp("student") / "student.yaml", attention_dropout=0.2)


def eight_steps(dumped: Dumped, student: Path, out: Path) -> dict[str, Any]:
    """Options of a run of 8 steps with a checkpoint after every second."""
    return {
        "cache": str(dumped.top_k),
        "student": str(student),
        "out": str(out),
        "max_steps": STEPS,
        "batch_tokens": 4 * BLOCK_LENGTH,
        "log_every": 2,
        "save_every": 2,
        "eval_every": 4,
        "learning_rate": 1e-2,
        "device": "cpu",
    }


@pytest.fixture
def values(dumped: Dumped, student: Path, tmp_path: Path) -> dict[str, Any]:
    return eight_steps(dumped, student, tmp_path / "out")


def train(values: dict[str, Any], resume: bool = False, progress: Any = None, **changes: Any) -> dict[str, Any]:
    return run_training(TrainOptions.build(values | changes), resume, progress)


def assert_same_run(one: Path, other: Path) -> None:
    """Equal in every bit: metrics, weights, config, tokenizer and result."""
    assert rows_of(one) == rows_of(other)
    assert result_of(one) == result_of(other)
    assert_same_weights(one, other)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())


# ------------------------------------------------------------------------------------- children and kills


@pytest.fixture(scope="module")
def in_child() -> Iterator[Child]:
    """Call as in_child(values, resume, kill, at): train in a process of its own, which kills itself at step `at` in
    the way `kill` names; returns the exit status. The processes are forked from one that only imports.
    """
    context = forkserver()
    here, there = context.Pipe()
    nursery = start(context, _nursery, there)
    there.close()

    def run(values: dict[str, Any], resume: bool = False, kill: str = "", at: int = 0) -> int:
        here.send((values, resume, kill, at))
        return int(here.recv())

    yield run
    here.send(None)
    nursery.join()


@pytest.fixture(scope="module")
def uninterrupted(in_child: Child, dumped: Dumped, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that interrupted ones must equal; made in a child, as those are."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert in_child(eight_steps(dumped, student, out)) == 0
    return out


def _nursery(jobs: Any) -> None:
    while (job := jobs.recv()) is not None:
        child = os.fork()
        if child == 0:
            try:
                _child(*job)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        jobs.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _child(values: dict[str, Any], resume: bool, kill: str, at: int) -> None:
    torch.set_num_threads(1)
    if kill == "checkpoint":
        _die_while_saving(at)
    if kill == "result":
        _die_before("save_model")

    def progress(step: int, total: int, metrics: dict[str, float]) -> None:
        if kill == "step" and step == at:
            _die()

    train(values, resume, progress)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_while_saving(step: int) -> None:
    """Die in the middle of a checkpoint: after the weights, before the optimiser's state."""
    from logitcache.training import DistillationTrainer

    def save(self: Any, folder: str) -> None:
        if self.state.global_step == step:
            _die()
        whole(self, folder)

    whole = DistillationTrainer._save_optimizer_and_scheduler
    DistillationTrainer._save_optimizer_and_scheduler = save


def _die_before(name: str) -> None:
    """Die when all steps are done, before the student is written."""
    setattr(models, name, lambda *_: _die())


# ------------------------------------------------------------------------------------- equal and resumed


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


@pytest.mark.parametrize(
    ("kill", "at"), [("step", 1), ("step", 4), ("step", 5), ("checkpoint", 2), ("checkpoint", 6), ("result", 0)]
)
def test_killed_and_resumed(values: dict[str, Any], in_child: Child, uninterrupted: Path, kill: str, at: int) -> None:
    """Before the first checkpoint, at a checkpoint, after it, inside one, and after the last step."""
    assert in_child(values, kill=kill, at=at) == -signal.SIGKILL
    out = Path(values["out"])
    assert not (out / "result.json").exists()
    assert in_child(values, resume=True) == 0
    assert_same_run(uninterrupted, out)
    assert all((folder / COMPLETE).exists() for folder in (out / "checkpoints").iterdir())


def test_killed_and_resumed_twice(values: dict[str, Any], in_child: Child, uninterrupted: Path) -> None:
    assert in_child(values, kill="step", at=3) == -signal.SIGKILL
    assert in_child(values, resume=True, kill="step", at=7) == -signal.SIGKILL
    with (Path(values["out"]) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert in_child(values, resume=True) == 0
    assert_same_run(uninterrupted, Path(values["out"]))


def test_accumulation_and_many_epochs_resume_too(values: dict[str, Any], in_child: Child, tmp_path: Path) -> None:
    """The whole cache is 108 blocks; with 2 * 30 in a step, every second step begins another epoch."""
    values |= {"batch_tokens": 30 * BLOCK_LENGTH, "accumulate": 2, "max_steps": 4, "alpha_schedule": "wsd"}
    whole = values | {"out": str(tmp_path / "whole")}
    assert in_child(whole) == 0
    assert in_child(values, kill="step", at=3) == -signal.SIGKILL
    assert in_child(values, resume=True) == 0
    assert_same_run(tmp_path / "whole", Path(values["out"]))


def test_resuming_a_finished_run_returns_its_result(values: dict[str, Any]) -> None:
    result = train(values, max_steps=2)
    before = sorted((path, path.stat().st_mtime_ns) for path in Path(values["out"]).rglob("*"))
    assert train(values, resume=True, max_steps=2) == result
    assert sorted((path, path.stat().st_mtime_ns) for path in Path(values["out"]).rglob("*")) == before


# ---------------------------------------------------------------------------------------- what it leaves


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


def test_training_is_quiet_when_it_resumes(values: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    class Stopped(Exception):
        pass

    def stop(step: int, total: int, metrics: dict[str, float]) -> None:
        if step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        train(values, progress=stop)
    train(values, resume=True)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


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


def test_a_last_step_that_diverges(values: dict[str, Any]) -> None:
    """Nothing that is measured sees what it did to the weights."""
    with pytest.raises(TrainingError, match=r"the weight .* is not finite after step 1: training diverged"):
        train(values, held_out=0, max_steps=1, learning_rate=1e38, warmup=0)
    assert not (Path(values["out"]) / "model.safetensors").exists()


def test_length_of_a_run(values: dict[str, Any]) -> None:
    """103 training blocks of 108 in batches of 4; the last of epochs, max_tokens and max_steps wins."""
    del values["max_steps"]
    for changes, steps in (({}, 26), ({"epochs": 0.2}, 5), ({"epochs": 3, "max_tokens": 1024}, 8)):
        options = values | changes | {"out": values["out"] + str(steps), "log_every": 100}
        assert train(options)["steps"] == steps


# --------------------------------------------------------------------------------------- what it refuses


def another_tokenizer(folder: Path) -> Path:
    """A model folder whose tokenizer is not the cache's."""
    models.save_model(models.load_model(save_tiny(folder), device="cpu"), folder, tiny_tokenizer(290))
    return folder


BERT = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "is_decoder": True}
Change = Callable[[Path, Dumped], dict[str, Any]]
REFUSED: dict[str, tuple[str, Change]] = {
    "vocabulary": (
        "vocabulary of 200 ids.*at least 300",
        lambda root, _: {"student": str(student_yaml(root / "s.yaml", vocab_size=200))},
    ),
    "student folder's vocabulary": (
        "vocabulary of 270 ids",
        lambda root, _: {"student": str(save_tiny(root / "s", vocab_size=270, with_tokenizer=False))},
    ),
    "student's tokenizer": (
        "has a tokenizer with hash .* the cache was made with",
        lambda root, _: {"student": str(another_tokenizer(root / "s"))},
    ),
    "positions": (
        "takes 16 positions, the cache's blocks have 32",
        lambda root, _: {"student": str(student_yaml(root / "s.yaml", max_position_embeddings=16))},
    ),
    "learned positions": (
        "takes 31 positions",
        lambda root, _: {"student": str(save_tiny(root / "s", "gpt2", with_tokenizer=False, n_positions=31))},
    ),
    "unknown key": (
        "has a key 'hidden_sise'.*did you mean 'hidden_size'",
        lambda root, _: {"student": str(student_yaml(root / "s.yaml", hidden_sise=3))},
    ),
    "no model type": (
        "names no model_type",
        lambda root, _: {"student": str(student_yaml(root / "s.yaml", model_type=None))},
    ),
    "unknown model type": (
        "has model_type 'lama', which this transformers does not know; did you mean 'llama'?",
        lambda root, _: {"student": str(student_yaml(root / "s.yaml", model_type="lama"))},
    ),
    "no causal language model": (
        "in a way logitcache does not know",
        lambda root, _: {"student": written(root, json.dumps(BERT))},
    ),
    "sizes that do not fit": (
        "not a usable transformers config|does not run",
        lambda root, _: {"student": str(student_yaml(root / "s.yaml", hidden_size=30))},
    ),
    "a size that is text": (
        "not a usable transformers config",
        lambda root, _: {"student": str(student_yaml(root / "s.yaml", hidden_size="big"))},
    ),
    "broken YAML": ("not a usable transformers config", lambda root, _: {"student": written(root, "a: [b: {")}),
    "binary YAML": ("not a usable transformers config", lambda root, _: {"student": written(root, b"\xff\xfe\x00")}),
    "YAML of a list": ("names no model_type", lambda root, _: {"student": written(root, "[1, 2]")}),
    "no student": ("student.yaml cannot be read", lambda root, _: {"student": str(root / "student.yaml")}),
    "no student folder": ("does not exist", lambda root, _: {"student": str(root / "student")}),
    "tail of samples": (
        "--tail bucket needs exact probabilities, .* --select varopt:K",
        lambda _, made: {"cache": str(made.sample), "tail": "bucket"},
    ),
    "option of another objective": (
        "--objective forward-kl has no --beta, but --beta is 0.5",
        lambda *_: {"beta": 0.5},
    ),
    "blend of another tail": ("--blend is 0.5, but only --tail blend mixes", lambda *_: {"blend": 0.5}),
    "blend": ("^--blend is 2; it must be less than or equal to 1$", lambda *_: {"tail": "blend", "blend": 2}),
    "negative z-loss": ("^--z-loss is -1; it must be greater than or equal to 0$", lambda *_: {"z_loss": -1}),
    "tail of top-k": ("^--tail unbiased needs sampled", lambda *_: {"tail": "unbiased"}),
    "temperature": ("--temperature is 2.0", lambda *_: {"temperature": 2}),
    "alpha schedule": ("warmup and decay", lambda *_: {"alpha_warmup": 0.7, "alpha_decay": 0.7}),
    "held-out cache": (
        "held-out cache .* made with another tokenizer",
        lambda root, _: {"held_out_cache": str(random_cache(root / "strange").root)},
    ),
    "no block to train on": ("too few to hold some out", lambda *_: {"held_out": 0.999}),
    "no cache": ("does not exist", lambda root, _: {"cache": str(root / "nothing")}),
    "unfinished cache": ("is unfinished", lambda root, made: {"cache": str(unfinished(root, made))}),
    "tokenizer": (
        "the tokenizer has hash",
        lambda root, _: {"tokenizer": str(another_tokenizer(root / "t"))},
    ),
    "no tokenizer there": ("has no tokenizer", lambda root, _: {"tokenizer": str(root)}),
    "no tokenizer for other text": (
        "does not exist",
        lambda root, made: {"cache": str(orphan(root, made)), "eval_text": (str(made.corpus),)},
    ),
    "other text": ("does not exist", lambda root, _: {"eval_text": (str(root / "text.txt"),)}),
    "empty other text": ("the corpus is empty", lambda root, _: {"eval_text": (written(root, "  \n", "text.txt"),)}),
    "reporter": ("report_to: 'carrier-pigeon'", lambda *_: {"report_to": ("carrier-pigeon",)}),
    "option": ("no option 'learning_rat'; did you mean 'learning_rate'", lambda *_: {"learning_rat": 1}),
    "value": ("^--alpha is 2; it must be less than or equal to 1$", lambda *_: {"alpha": 2}),
    "endless": ("--epochs is inf; it must be a finite number", lambda *_: {"epochs": float("inf")}),
    "no number": ("--learning-rate is nan; it must be a finite number", lambda *_: {"learning_rate": float("nan")}),
    "negative steps": ("--max-steps is -1; it must be", lambda *_: {"max_steps": -1}),
    "objective": ("--objective is 'hinge'; it must be 'auto', ", lambda *_: {"objective": "hinge"}),
}


def written(root: Path, content: str | bytes, name: str = "student.yaml") -> str:
    path = root / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def unfinished(root: Path, made: Dumped) -> Path:
    """A cache whose dump has not come to its end."""
    shutil.copytree(made.top_k, root / "part")
    (root / "part" / "manifest.json").unlink()
    return root / "part"


def orphan(root: Path, made: Dumped) -> Path:
    """A cache whose teacher is no longer where the dump found it."""
    from logitcache.dump import DumpOptions, Output, run_dump
    from logitcache.selection import Selection

    shutil.copytree(made.teacher, root / "gone")
    output = Output(Selection.parse("top-k:4"), root / "orphan")
    run_dump(DumpOptions(str(root / "gone"), (str(made.corpus),), (output,), device="cpu", block_length=BLOCK_LENGTH))
    shutil.rmtree(root / "gone")
    return root / "orphan"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_first_step(name: str, values: dict[str, Any], dumped: Dumped, tmp_path: Path) -> None:
    message, change = REFUSED[name]
    with pytest.raises(LogitcacheError, match=message) as caught:
        train(values | change(tmp_path, dumped))
    assert "\n" not in str(caught.value)
    assert not Path(values["out"]).exists()


def test_a_refused_start_does_not_block_the_next(values: dict[str, Any]) -> None:
    with pytest.raises(LogitcacheError):
        train(values, student="nothing.yaml")
    assert train(values, max_steps=2)["steps"] == 2


def test_a_cache_of_one_block_holds_nothing_out(values: dict[str, Any], tmp_path: Path) -> None:
    from logitcache.store import Geometry

    small = random_cache(
        tmp_path / "small", geometry=Geometry(num_tokens=9, block_length=9, chunk_blocks=1, unit_blocks=1)
    )
    with pytest.raises(TrainingError, match="only 1 block, too few"):
        train(values, cache=str(small.root))


def test_a_cache_without_its_teacher_trains(values: dict[str, Any], dumped: Dumped, tmp_path: Path) -> None:
    """No tokenizer is saved then; with --tokenizer it is."""
    cache = str(orphan(tmp_path, dumped))
    train(values, cache=cache, max_steps=2)
    assert not (Path(values["out"]) / "tokenizer.json").exists()
    train(values, cache=cache, max_steps=2, tokenizer=str(dumped.teacher), out=values["out"] + "2")
    assert (Path(values["out"] + "2") / "tokenizer.json").exists()


def test_held_out_cache_with_a_larger_vocabulary(values: dict[str, Any], dumped: Dumped, tmp_path: Path) -> None:
    """The same tokenizer, but a teacher whose head has more rows than the student's."""
    from logitcache.dump import DumpOptions, Output, run_dump
    from logitcache.selection import Selection

    teacher = save_tiny(tmp_path / "wide", vocab_size=320)
    output = Output(Selection.parse("top-k:4"), tmp_path / "held")
    run_dump(DumpOptions(str(teacher), (str(dumped.corpus),), (output,), device="cpu", block_length=BLOCK_LENGTH))
    with pytest.raises(TrainingError, match="vocabulary of 300 ids, the cache holds ids up to 319"):
        train(values, held_out_cache=str(tmp_path / "held"))
    assert not Path(values["out"]).exists()


def test_options_of_later_versions_have_their_defaults(values: dict[str, Any]) -> None:
    """A run that was begun before an option existed can be resumed."""
    train(values, max_steps=2)
    path = Path(values["out"]) / "run.json"
    record = json.loads(path.read_text())
    del record["options"]["fsdp"], record["options"]["z_loss"]
    path.write_text(json.dumps(record))
    assert train(values, resume=True, max_steps=2)["steps"] == 2
    with pytest.raises(TrainingError, match=r"z_loss: the run has 0\.0, now 0\.5"):
        train(values, resume=True, max_steps=2, z_loss=0.5)


def test_resume_with_other_options(values: dict[str, Any], dumped: Dumped) -> None:
    train(values, max_steps=2)
    with pytest.raises(TrainingError) as caught:
        train(values, resume=True, max_steps=2, learning_rate=0.5, seed=3)
    message = str(caught.value)
    assert "learning_rate: the run has 0.01, now 0.5" in message
    assert "seed: the run has 0, now 3" in message
    assert "alpha" not in message
    with pytest.raises(TrainingError, match="cache's content is another one"):
        train(values, resume=True, max_steps=2, cache=str(dumped.dense))


def test_resume_with_another_objective(values: dict[str, Any], dumped: Dumped) -> None:
    values |= {"cache": str(dumped.varopt), "tail": "blend", "blend": 0.0, "max_steps": 2}
    train(values)
    with pytest.raises(TrainingError) as caught:
        train(values, resume=True, blend_end=1.0, z_loss=1e-4)
    assert "blend_end: the run has None, now 1.0" in str(caught.value)
    assert "z_loss: the run has 0.0, now 0.0001" in str(caught.value)
    with pytest.raises(TrainingError, match="objective: the run has 'auto', now 'jsd'"):
        train({key: value for key, value in values.items() if key not in ("tail", "blend")}, True, objective="jsd")


def test_resume_with_the_cache_elsewhere(values: dict[str, Any], dumped: Dumped, tmp_path: Path) -> None:
    result = train(values, max_steps=2)
    shutil.copytree(dumped.top_k, tmp_path / "moved")
    assert train(values, resume=True, max_steps=2, cache=str(tmp_path / "moved")) == result


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors"])
def test_a_checkpoint_with_flipped_bits_is_passed_over(
    name: str, values: dict[str, Any], in_child: Child, uninterrupted: Path
) -> None:
    """The one before leads to the same weights."""
    assert in_child(values, kill="step", at=7) == -signal.SIGKILL
    damaged = Path(values["out"]) / "checkpoints" / "checkpoint-6" / name
    damaged.write_bytes(damaged.read_bytes()[:-64] + bytes(64))
    assert in_child(values, resume=True) == 0
    assert_same_run(uninterrupted, Path(values["out"]))


def test_the_folder_of_a_run(values: dict[str, Any]) -> None:
    """Occupied, absent, not a folder, or with a damaged result.json or run.json."""
    out = Path(values["out"])
    with pytest.raises(TrainingError, match="no run to resume; start it without --resume"):
        train(values, resume=True)
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(UsageError, match="is a file"):
        train(values)
    out.unlink()
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(TrainingError, match="not empty and holds no run"):
        train(values)
    (out / "thesis.tex").unlink()
    (out / "run.json.tmp").write_text("{")
    train(values, max_steps=2)
    with pytest.raises(TrainingError, match="holds a run already; go on with --resume"):
        train(values, max_steps=2)
    (out / "result.json").write_text("{")
    with pytest.raises(TrainingError, match=r"result\.json is damaged .*; remove it and use --resume"):
        train(values, resume=True, max_steps=2)
    (out / "run.json").write_text("{")
    with pytest.raises(TrainingError, match=r"run\.json is damaged"):
        train(values, resume=True, max_steps=2)
