"""Patched models under DDP, FSDP and transformers' own Trainer: in this process, and in two of gloo."""

from __future__ import annotations

from typing import Any

import pytest

from tests.caches import random_cache
from tests.losses import wrappers
from tests.losses.batches import assert_same_grads
from tests.ranks import run_ranks
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cache") / "sampled"
    random_cache(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ranks(cache: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(wrappers.work, 2, tmp_path_factory.mktemp("wrappers"), cache)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp1", "fsdp2", "fsdp2 head"])
def test_the_gradient_is_that_of_one_process(ranks: list[dict[str, Any]], wrapper: str) -> None:
    """'fsdp2 head': the head is gathered by hooks of its own, and the model is patched when it is sharded already."""
    for found in ranks:
        assert found[wrapper] < 1e-5


def test_mixed_precision_does_not_round_the_teacher(ranks: list[dict[str, Any]]) -> None:
    """FSDP casts floating-point inputs to bfloat16; packed rows hold none, others are refused."""
    for found in ranks:
        mixed = found["mixed"]
        for version in ("1", "2"):
            assert "rounds the teacher's probabilities" in mixed[f"fsdp{version}"]
            assert mixed[f"loss{version}"] == pytest.approx(mixed["exact"], rel=5e-3)


def test_trainer_over_processes_and_accumulation(ranks: list[dict[str, Any]]) -> None:
    """Two processes that accumulate twice one sequence, and one process with four at once, train the same."""
    expected = wrappers.trained(wrappers.new_model(), batch=4)
    assert expected["losses"][-1] < expected["losses"][0]
    for found in ranks:
        assert found["trainer"]["processes"] == 2
        assert found["trainer"]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["trainer"]["eval"] == pytest.approx(expected["eval"], rel=1e-5)
        assert_same_grads(found["trainer"]["weights"], expected["weights"], 1e-5)


@pytest.mark.parametrize(("name", "mask"), [("distilled", None), ("masked", wrappers.MASK)])
def test_our_own_trainer_over_processes(ranks: list[dict[str, Any]], name: str, mask: Any) -> None:
    """Loss, its two terms and alpha of each step, with halves of which one counts more tokens than the other."""
    expected = wrappers.distilled(rank=-1, mask=mask)
    for found in ranks:
        for ours, theirs in zip(found[name], expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_cache_over_processes(ranks: list[dict[str, Any]], cache: str) -> None:
    """Two processes read other blocks: together, what one reads that accumulates twice."""
    expected = wrappers.from_cache(cache, accumulate=2)
    assert len(set(expected)) == 4
    for found in ranks:
        assert found["cache"] == pytest.approx(expected, rel=1e-5)


def test_trainer_on_labels_alone() -> None:
    """Accumulation included, a patched model trains as an unpatched one."""
    runs = []
    for model in (wrappers.new_model(), tiny_model(wrappers.FAMILY, seed=2).train()):
        runs.append(wrappers.trained(model, batch=1, accumulate=4, with_targets=False))
    ours, theirs = runs
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["eval"] == pytest.approx(theirs["eval"], rel=1e-5)
    assert_same_grads(ours["weights"], theirs["weights"], 1e-5)
