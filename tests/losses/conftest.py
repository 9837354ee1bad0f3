"""What the tests of patched models share."""

from __future__ import annotations

from typing import Any

import pytest

from logitcache.losses import patch_forward
from tests.losses.batches import Example
from tests.tiny import tiny_model


@pytest.fixture
def example() -> Example:
    return Example()


@pytest.fixture
def model() -> Any:
    return patch_forward(tiny_model("llama", seed=2))
