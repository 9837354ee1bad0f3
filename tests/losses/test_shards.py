"""A head split over processes gives the loss and the gradients of the whole one: two real gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from logitcache.errors import ObjectiveError
from logitcache.kernels import HeadOptions, VocabularyShard, linear_gather
from tests.losses import shards
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(shards.work, 2, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("what", ["gather", "loss", "statistics"])
@pytest.mark.parametrize("split", shards.SPLITS)
def test_the_whole_head(ranks: list[dict[str, Any]], split: str, what: str) -> None:
    """Every implementation, tail and temperature; labels and ids on both sides; uneven and empty blocks."""
    for found in ranks:
        errors = {name: error for name, error in found["checks"].items() if name.startswith(f"{what} {split} ")}
        errors |= {name: error for name, error in found["checks"].items() if name == f"{what} {split}"}
        assert errors
        assert max(errors.values()) < 1e-12, errors


def test_half_precision(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["half"]["split"] <= 2 * found["half"]["whole"], found["half"]


def test_shards_are_gathered(ranks: list[dict[str, Any]]) -> None:
    assert [found["shard"] for found in ranks] == [(0, 19), (3, 19)]


def test_a_shard_needs_a_process_group() -> None:
    with pytest.raises(ObjectiveError, match="needs a process group, and there is none; call"):
        VocabularyShard.of(4)


def test_a_weight_that_is_not_the_shards() -> None:
    ids = torch.zeros(1, 0, dtype=torch.int64)
    head = HeadOptions(shard=VocabularyShard(None, start=6, total=10))
    with pytest.raises(ObjectiveError, match="weight has 5 rows from id 6 on, but the whole head has 10"):
        linear_gather(torch.zeros(1, 2), torch.zeros(5, 2), ids, head=head)
