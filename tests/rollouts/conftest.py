"""The parts of `rollout_caches`; read only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollouts import Rollouts


@pytest.fixture(scope="session")
def place(rollout_caches: Rollouts) -> Path:
    return rollout_caches.place


@pytest.fixture(scope="session")
def rollouts(rollout_caches: Rollouts) -> dict[str, Path]:
    return rollout_caches.masked


@pytest.fixture(scope="session")
def whole(rollout_caches: Rollouts) -> dict[str, Path]:
    return rollout_caches.whole
