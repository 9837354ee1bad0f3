"""What is made of masked caches and of those without ids: derived caches, students, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from logitcache.algebra import Derivation, derive_cache
from logitcache.audit import AuditOptions, audit_cache
from logitcache.distill import run_training
from logitcache.errors import (
    CacheError,
    InterchangeError,
    ObjectiveError,
    TrainingError,
    UsageError,
)
from logitcache.interchange import export_cache
from logitcache.losses import Objective, distillation_loss
from logitcache.reader import CacheDataset, ReaderOptions
from logitcache.selection import Selection
from logitcache.stats import measure_stats
from logitcache.store import open_cache
from logitcache.store.card import dataset_card
from logitcache.training.options import TrainOptions
from logitcache.training.run_data import RunData
from tests.caches import student_yaml
from tests.codec.rows import assert_equal
from tests.rollouts import (
    LENGTH,
    SPECS,
    everything,
    mask_of,
    reopened,
)


@pytest.mark.parametrize(
    ("source", "spec"),
    [("top-k:7", "top-k:3"), ("top-k:7", "sample:4"), ("sample:11", "sample:4"), ("varopt:9", "label")],
)
def test_derived_rows_are_those_of_a_cache_without_a_mask(
    rollouts: dict[str, Path], source: str, spec: str, tmp_path: Path
) -> None:
    """Of the rows that count, the others stay empty."""
    root = tmp_path / "derived"
    derive_cache(rollouts[source], root, Derivation(Selection.parse(spec), max_tail_mass=1))
    cache, old = reopened(root), everything(open_cache(rollouts[source]))
    new = everything(cache)
    np.testing.assert_array_equal(mask_of(new), mask_of(old))
    counted = np.flatnonzero(mask_of(new))
    rows, before = new.targets.take(counted), old.targets.take(counted)
    assert not new.targets.take(np.flatnonzero(~mask_of(new))).row_lengths.any()
    np.testing.assert_array_equal(rows.label_logprob, before.label_logprob)
    selection = Selection.parse(spec)
    for row in range(len(rows)):
        assert set(rows.slice(row, row + 1).ids) <= set(before.slice(row, row + 1).ids)
    assert (rows.row_lengths <= selection.size).all()
    if selection.method == "sample":
        np.testing.assert_allclose(rows.row_sums(), 1, rtol=1e-6)
    if selection.method == "top-k":
        assert (rows.row_lengths == 3).all()


# ---------------------------------------------------------------------------------------------- label caches


def test_label_is_derived_from_every_selection(whole: dict[str, Path], tmp_path: Path) -> None:
    """And is then what a dump would have kept."""
    wanted = everything(open_cache(whole["label"]))
    for spec in SPECS[:-1]:
        derive_cache(whole[spec], tmp_path / spec, Derivation(Selection.parse("label")))
        cache = reopened(tmp_path / spec)
        assert not cache.keeps_ids
        assert_equal(everything(cache).targets, wanted.targets)
        assert cache.manifest.identity.ancestry[-1].arguments == {"select": "label", "from": spec}
    assert wanted.targets.ids.size == 0
    assert (wanted.targets.tail_mass == 1).all()
    assert np.isnan(wanted.targets.entropy).all()


def test_what_label_cannot_be_derived_from_and_cannot_give(whole: dict[str, Path], tmp_path: Path) -> None:
    label = Derivation(Selection.parse("label"))
    with pytest.raises(UsageError, match="which holds label: it stores no ids; dump with --select top-k:3"):
        derive_cache(whole["label"], tmp_path / "no", Derivation(Selection.parse("top-k:3")))
    with pytest.raises(UsageError, match="which --drop would forget"):
        derive_cache(whole["top-k:7"], tmp_path / "no", Derivation(Selection.parse("label"), drop=("label_logprob",)))
    derive_cache(whole["top-k:7"], tmp_path / "dropped", Derivation(drop=("label_logprob",)))
    with pytest.raises(
        CacheError, match=r"does not know the teacher's log-probability of its tokens \(label_logprob\)"
    ):
        derive_cache(tmp_path / "dropped", tmp_path / "no", label)
    with pytest.raises(UsageError, match="would change"):
        derive_cache(whole["label"], tmp_path / "no", label)
    assert not (tmp_path / "no").exists()


def test_caches_of_two_masks_are_no_average(place: Path, rollouts: dict[str, Path], whole: dict[str, Path]) -> None:
    """What else can be done with them is said; asked for, it is done."""
    values = {"cache": (str(rollouts["label"]), str(whole["label"])), "student": "s", "out": str(place / "no")}
    with pytest.raises(TrainingError, match=r"or take them for several corpora with --set combine=mix$"):
        RunData(TrainOptions.build(values))
    assert len(RunData(TrainOptions.build(values | {"combine": "mix"})).sources) == 2


@pytest.mark.parametrize("folders", ["rollouts", "whole"])
def test_policy_gradient_learns_from_labels_alone(
    folders: str, place: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    caches: dict[str, Path] = request.getfixturevalue(folders)
    base = {
        "student": str(student_yaml(tmp_path / "student.yaml")), "max_steps": 3, "batch_tokens": 4 * LENGTH,
        "device": "cpu", "log_every": 1, "alpha": 1.0,
    }  # fmt: skip

    def train(spec: str, **changes: Any) -> dict[str, Any]:
        options = {**base, "cache": str(caches[spec]), "objective": "policy-gradient", **changes}
        return run_training(TrainOptions.build({**options, "out": str(tmp_path / spec / str(changes))}))

    result = train("label")
    assert result["steps"] == 3
    assert "eval_kl" not in result
    assert train("label", objective="cross-entropy")["eval_ce"] > 0
    for objective in ("auto", "forward-kl", "reverse-kl", "mse", "decoupled"):
        with pytest.raises(
            ObjectiveError, match=r"these targets hold none \(--select label keeps the labels' log-prob"
        ):
            train("label", objective=objective)


@pytest.mark.parametrize("spec", SPECS)
def test_the_loss_is_that_of_the_rows_that_count(place: Path, rollouts: dict[str, Path], spec: str) -> None:
    cache = open_cache(rollouts[spec])
    batch = next(iter(CacheDataset(cache, ReaderOptions(4, shuffle=False))))
    blocks = cache.read_blocks(0, 4)
    hidden = torch.randn(4 * LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(300, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    counted = np.flatnonzero(mask_of(blocks))
    objective = Objective.default_for(cache.unbiased) if cache.keeps_ids else Objective.policy_gradient()
    labels = torch.from_numpy(blocks.labels()).flatten()
    found = distillation_loss(hidden, weight, batch["labels"].flatten(), batch.targets, objective, alpha=0.5)
    alone = distillation_loss(
        hidden[counted], weight, labels[counted], blocks.targets.take(counted), objective, alpha=0.5
    )
    torch.testing.assert_close(found, alone)


# ---------------------------------------------------------------------------------------------- exports


def test_exports(rollouts: dict[str, Path], whole: dict[str, Path], tmp_path: Path) -> None:
    cache = open_cache(rollouts["top-k:7"])
    blocks = everything(cache)
    counted = mask_of(blocks)[blocks.valid]
    export_cache(cache, "parquet", tmp_path / "parquet")
    table = pq.read_table(tmp_path / "parquet" / "data")
    assert table["counted"].to_pylist() == counted.tolist()
    assert [token or -100 for token in table["next_token"].to_pylist()] == [
        label or -100 for label in blocks.labels()[blocks.valid].tolist()
    ]
    export_cache(cache, "trl", tmp_path / "trl")
    rows = pq.read_table(tmp_path / "trl" / "data").to_pylist()
    for number, row in enumerate(rows):
        labels = blocks.labels()[number]
        learnt = [token for token, kept in zip(row["input_ids"], row["completion_mask"], strict=True) if kept]
        assert learnt == labels[labels >= 0].tolist()
    with pytest.raises(InterchangeError, match="keeps rows of completions only, but DistillKit stores the same k ids"):
        export_cache(cache, "distillkit", tmp_path / "distillkit")
    for target in ("trl", "distillkit"):
        with pytest.raises(InterchangeError, match=r"holds no ids \(label\), but .* wants the most probable ones"):
            export_cache(open_cache(whole["label"]), target, tmp_path / "no")
    export_cache(open_cache(whole["label"]), "parquet", tmp_path / "label")
    assert "counted" not in pq.read_table(tmp_path / "label" / "data").column_names


def test_the_card_names_an_objective_that_the_cache_has_rows_for(whole: dict[str, Path]) -> None:
    told = {spec: dataset_card(open_cache(root).manifest, 1, "s3://b/c") for spec, root in whole.items()}
    assert {spec for spec, text in told.items() if "--out run --objective policy-gradient\n" in text} == {"label"}


@pytest.mark.parametrize("spec", SPECS)
def test_masked_caches_are_the_teachers(rollouts: dict[str, Path], place: Path, spec: str) -> None:
    report = audit_cache(rollouts[spec], AuditOptions(str(place / "teacher"), rows=40, device="cpu"))
    assert report.verdict == "same teacher"
    assert report.rows == 40


@pytest.mark.parametrize("spec", SPECS)
def test_statistics_of_a_masked_cache_are_of_what_counts(rollouts: dict[str, Path], spec: str) -> None:
    blocks = everything(reopened(rollouts[spec]))
    counted = mask_of(blocks).ravel()
    rows, found = blocks.targets.take(np.flatnonzero(counted)), measure_stats(rollouts[spec])
    assert found.tokens == blocks.valid.sum()
    assert (found.rows, found.labelled) == (counted.sum(), counted.sum())
    if spec == "label":
        assert found.ids is found.label_kept is None
        return
    assert found.ids.mean == pytest.approx(rows.row_lengths.mean())
    assert found.label_kept == pytest.approx(
        (rows.ids == np.repeat(blocks.labels().ravel()[counted], rows.row_lengths)).sum() / counted.sum()
    )
    if found.top_ids:
        assert found.top_ids[0].row_share == pytest.approx((rows.ids == found.top_ids[0].id).sum() / counted.sum())
