"""What is kept of the most probable ids alone is what is kept of the whole distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logitcache.selection import Selection
from logitcache.selection.distribution import Distribution
from logitcache.selection.ranked import select_ranked
from logitcache.selection.select import select


@pytest.mark.parametrize("spec", ["top-k:1", "top-k:7", "top-k:20", "top-p:0.5:20", "top-p:0.9:4", "top-p:0.99:20"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_as_of_the_whole(spec: str, scale: float) -> None:
    """Of flat, ordinary and nearly certain rows, whose float32 probabilities are 0 but for a few."""
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)) * scale
    logprobs, ids = torch.log_softmax(logits.double(), -1).topk(20)
    given = select_ranked(Selection.parse(spec), ids.numpy(), logprobs.numpy())
    wanted = select(Selection.parse(spec), Distribution.from_logits(logits))
    np.testing.assert_array_equal(given.offsets, wanted.offsets)
    np.testing.assert_array_equal(given.ids, wanted.ids)
    np.testing.assert_allclose(given.weights, wanted.weights, rtol=1e-4)
    np.testing.assert_allclose(given.tail_mass, wanted.tail_mass, atol=1e-6)


def test_an_impossible_id_is_not_kept() -> None:
    given = select_ranked(Selection.parse("top-k:2"), np.array([[5, 3]]), np.array([[0.0, -np.inf]]))
    assert (given.ids.tolist(), given.weights.tolist(), given.tail_mass.tolist()) == ([5], [1.0], [0.0])
