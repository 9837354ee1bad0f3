"""Other tools' layouts: sizes by hand, and what comes back."""

from __future__ import annotations

import numpy as np
import pytest

from logitcache.bench.peers import BitPacked, ParquetZstd, Plain, peers_for
from logitcache.bench.yardstick import mean_divergence
from logitcache.targets import SparseTargets
from tests.codec.rows import count_rows, probability_rows


def test_sizes() -> None:
    """6 and 3 bytes an entry, and the lengths."""
    targets = count_rows(np.random.default_rng(0), 10, 1000, 25)
    entries = targets.ids.size
    assert sum(map(len, Plain().encode(targets))) == 6 * entries + 2 * 10
    assert sum(map(len, BitPacked(25).encode(targets))) == 3 * entries + 10
    assert [peer.name for peer in peers_for("top-k", 50, 49_152)] == [
        "int32 + fp16",
        "Parquet zstd",
        "17 + 7 bits",
        "DistillKit budget",
    ]
    assert [peer.name for peer in peers_for("top-k", 128, 262_144)][-1] == "DistillKit recommended"
    assert len(peers_for("sample", 25, 262_144)) == 2, "17 bits do not hold Gemma's ids"


def test_counts_come_back() -> None:
    targets = count_rows(np.random.default_rng(1), 30, 1000, 25)
    for peer in (BitPacked(25), ParquetZstd(), Plain()):
        decoded = peer.decode(peer.encode(targets), targets)
        np.testing.assert_array_equal(decoded.offsets, targets.offsets)
        np.testing.assert_array_equal(decoded.ids, targets.ids)
        np.testing.assert_allclose(decoded.weights, targets.weights, rtol=1e-3)


@pytest.mark.parametrize("size", [50, 128])
def test_probabilities_come_back(size: int) -> None:
    rng = np.random.default_rng(2)
    ids = np.sort(np.stack([rng.choice(1000, size, replace=False) for _ in range(40)]), axis=1)
    mass = rng.gamma(0.3, size=(40, size + 1)) + 1e-6
    weights = (mass / mass.sum(1, keepdims=True))[:, :size]
    targets = SparseTargets(np.arange(41) * size, ids.ravel(), weights.ravel())
    worst = {"int32 + fp16": 1e-4, "Parquet zstd": 1e-9, "17 + 7 bits": 0.02, "DistillKit recommended": 0.05}
    for peer in peers_for("top-k", size, 1000):
        decoded = peer.decode(peer.encode(targets), targets)
        np.testing.assert_array_equal(decoded.ids, targets.ids)
        assert 0 <= mean_divergence(targets, decoded) + 1e-12 < worst.get(peer.name, 1.0) + 1e-9


def test_divergence_is_the_definition() -> None:
    given = SparseTargets([0, 2, 3], [1, 2, 5], [0.5, 0.25, 0.9])
    got = SparseTargets([0, 2, 3], [1, 2, 5], [0.4, 0.4, 0.8])
    rows = [
        0.5 * np.log(0.5 / 0.4) + 0.25 * np.log(0.25 / 0.4) + 0.25 * np.log(0.25 / 0.2),
        0.9 * np.log(0.9 / 0.8) + 0.1 * np.log(0.1 / 0.2),
    ]
    assert mean_divergence(given, got) == pytest.approx(np.mean(rows), rel=1e-5)
    same = probability_rows(np.random.default_rng(0), 20, 50, 9)
    assert mean_divergence(same, same) == pytest.approx(0, abs=1e-7)
