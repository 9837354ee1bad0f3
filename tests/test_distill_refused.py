"""run_training: what it refuses before the first step, in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitcache import models
from logitcache.errors import LogitcacheError, TrainingError
from tests.caches import BLOCK_LENGTH, Dumped, dump_orphan, random_cache, student_yaml
from tests.short_runs import eight_steps, train
from tests.tiny import save_tiny, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def values(dumped: Dumped, unsteady_student: Path, tmp_path: Path) -> dict[str, Any]:
    return eight_steps(dumped, unsteady_student, tmp_path / "out")


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
        lambda root, made: {"cache": str(dump_orphan(root, made)), "eval_text": (str(made.corpus),)},
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
