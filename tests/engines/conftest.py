"""What the tests of engines share."""

from __future__ import annotations

from pathlib import Path

import pytest

from logitcache.teachers import TransformersTeacher
from tests.engines.dumps import dump, make_place, options
from tests.faults import forkserver, run_to_end


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a corpus; read only."""
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="session")
def teacher(place: Path) -> TransformersTeacher:
    """That of `place`."""
    return TransformersTeacher.load(place / "teacher", device="cpu")


@pytest.fixture(scope="session")
def whole(place: Path) -> Path:
    """The cache that one worker makes of them, uninterrupted; read only."""
    run_to_end(forkserver(), dump, options(place, place / "whole"))
    return place / "whole"
