"""What several folders of tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels then run as numpy programs. It looks at this when it is imported, which transformers does.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    from tests.caches import Dumped


@pytest.fixture(scope="session")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Dumped:
    """A tiny teacher and caches of it; read only."""
    from tests.caches import dump_tiny

    return dump_tiny(tmp_path_factory.mktemp("dumped"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch with one thread, so that sums are taken in one order whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
