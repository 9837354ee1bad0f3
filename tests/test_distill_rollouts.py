"""Students that learn from completions: refusals, resuming, masks of tokens, several caches and processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from logitcache.algebra import BlockRanges, Derivation, derive_cache, subset_cache
from logitcache.distill import run_training
from logitcache.errors import LogitcacheError, ObjectiveError, TrainingError, UsageError
from logitcache.store import open_cache
from logitcache.training.options import TrainOptions
from tests.caches import student_yaml
from tests.rollouts import LENGTH, Rollouts, dump, everything, mask_of
from tests.runs import assert_same_weights, rows_of
from tests.train_ranks import Job, Nursery

LABELS: dict[str, Any] = {"objective": "policy-gradient", "alpha": 1.0}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(student_yaml(tmp_path_factory.mktemp("student") / "student.yaml"))


def values(student: str, out: Path, cache: Any, **changes: Any) -> dict[str, Any]:
    given = {"student": student, "max_steps": 4, "batch_tokens": 4 * LENGTH, "device": "cpu", "log_every": 1}
    return {**given, "cache": [str(one) for one in cache], "out": str(out), **changes}


def train(student: str, out: Path, *cache: Path, resume: bool = False, **changes: Any) -> dict[str, Any]:
    return run_training(TrainOptions.build(values(student, out, cache, **changes)), resume=resume)


@pytest.mark.parametrize("spec", ["label", "top-k:7"])
def test_resume(spec: str, rollout_caches: Rollouts, student: str, tmp_path: Path, one_thread: None) -> None:
    cache, changes = rollout_caches.masked[spec], LABELS if spec == "label" else {"mask": "student-entropy:0.5"}
    for name in ("whole", "begun"):
        train(student, tmp_path / name, cache, save_every=2, **changes)
    (tmp_path / "begun" / "result.json").unlink()
    shutil.rmtree(tmp_path / "begun" / "checkpoints" / "checkpoint-4")
    result = train(student, tmp_path / "begun", cache, save_every=2, resume=True, **changes)
    assert result["eval_ce"] > 0
    assert_same_weights(tmp_path / "begun", tmp_path / "whole")


@pytest.mark.parametrize(("spec", "changes"), [
    ("label", LABELS),
    ("sample:11", {"mask": "teacher-entropy:0.5", "mask_rest": "nothing"}),
])  # fmt: skip
def test_two_processes(
    spec: str,
    changes: dict[str, Any],
    rollout_caches: Rollouts,
    nursery: Nursery,
    student: str,
    tmp_path: Path,
) -> None:
    """Which tokens count and which a mask keeps is the same as for one: their parts of a batch hold unequally many."""
    cache = rollout_caches.masked[spec]
    train(student, tmp_path / "one", cache, **changes)
    job = Job(values(student, tmp_path / "two", [cache], **changes), folder=tmp_path)
    assert nursery(job) == [0, 0], (tmp_path / "err0").read_text()
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row.keys() for row in two] == [row.keys() for row in one]
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_labels_of_several_corpora(rollout_caches: Rollouts, student: str, tmp_path: Path) -> None:
    """Mixed with one another and with a cache that has ids; a mean of rows with and without ids is refused."""
    place, mine = rollout_caches.place, rollout_caches.masked["label"]
    other, richer = tmp_path / "other", tmp_path / "richer"
    dump(place, place / "other" / "records.jsonl", ("label", other), ("top-k:7", richer))
    for number, caches in enumerate([(mine, other), (mine, richer)]):
        result = train(student, tmp_path / str(number), *caches, held_out=0.3, **LABELS)
        assert result["steps"] == 4
        assert "eval_kl" not in result
        assert sum(name.endswith("_ce") for name in result) == 3
    with pytest.raises(ObjectiveError, match="hold none"):
        train(student, tmp_path / "no", mine, richer, held_out=0.3)
    with pytest.raises(TrainingError, match="keeping ids is False and True"):
        train(student, tmp_path / "no", mine, rollout_caches.masked["top-k:7"], **LABELS)


def test_auto_on_labels_says_what_learns_from_them(rollout_caches: Rollouts, student: str, tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="use --objective policy-gradient, or dump with another --select"):
        train(student, tmp_path / "no", rollout_caches.whole["label"])


def test_what_a_cache_lacks_is_said_before_the_first_step(
    rollout_caches: Rollouts, student: str, tmp_path: Path
) -> None:
    """Though the first block, inside a prompt, lacks nothing."""
    mine = rollout_caches.masked
    assert not mask_of(open_cache(mine["label"]).read_blocks(0, 1)).any()
    with pytest.raises(UsageError, match=r"does not hold the teacher's entropy; .* --mask student-entropy:0\.5$"):
        train(student, tmp_path / "no", mine["label"], mask="teacher-entropy:0.5", **LABELS)
    derive_cache(mine["top-k:7"], tmp_path / "dropped", Derivation(drop=("label_logprob",)))
    with pytest.raises(ObjectiveError, match="needs the teacher's log-probability of every label"):
        train(student, tmp_path / "no", tmp_path / "dropped", **LABELS)
    assert not (tmp_path / "no").exists()


def test_blocks_of_prompts_alone_are_no_evaluation(rollout_caches: Rollouts, student: str, tmp_path: Path) -> None:
    """A cross entropy of nothing would be 0, and the best."""
    source = rollout_caches.masked["top-k:7"]
    empty = int((~mask_of(everything(open_cache(source))).any(1)).argmax())
    subset_cache(source, tmp_path / "prompt", BlockRanges.parse(str(empty)))
    failed: list[LogitcacheError] = []
    for given in ({"cache": source, "held_out_cache": str(tmp_path / "prompt")},
                  {"cache": tmp_path / "prompt", "held_out_cache": str(source)}):  # fmt: skip
        with pytest.raises(TrainingError, match="nothing is to be learnt in 1 block of") as caught:
            train(student, tmp_path / "no", given.pop("cache"), **given)  # type: ignore[arg-type]
        failed.append(caught.value)
    assert ["held out" in str(error) for error in failed] == [True, False]
