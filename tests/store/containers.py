"""Containers of random planes, and what must be read back from them."""

from __future__ import annotations

import numpy as np

from logitcache.store.container import Container
from logitcache.store.layout import SUFFIXES

Chunks = list[dict[str, np.ndarray]]
KINDS = list(SUFFIXES)


def chunks_of(seed: int = 0, sizes: tuple[int, ...] = (40, 7, 0, 90), top: int = 70_000) -> Chunks:
    """Chunks of two planes: `ids` below `top`, and half as many `counts`."""
    rng = np.random.default_rng(seed)
    return [{"ids": rng.integers(0, top, size), "counts": rng.integers(0, 3, size // 2)} for size in sizes]


def check(container: Container, chunks: Chunks) -> None:
    """The container holds exactly these chunks, in unsigned types."""
    assert container.num_chunks == len(chunks)
    for number, chunk in enumerate(chunks):
        read = container.read_chunk(number)
        assert read.keys() == chunk.keys()
        for name, plane in chunk.items():
            assert read[name].dtype.kind == "u"
            np.testing.assert_array_equal(read[name], plane)
