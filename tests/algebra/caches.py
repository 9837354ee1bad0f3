"""Caches to make others from, and what must be in those."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from logitcache.store import Blocks, Cache, Geometry, open_cache
from logitcache.targets import SparseTargets
from tests.caches import random_cache
from tests.codec.rows import assert_equal
from tests.store.caches import make_cache

# Two corpora of blocks of 5 tokens; both end inside a block.
PROSE = Geometry(num_tokens=103, block_length=5, chunk_blocks=3, unit_blocks=6)
CODE = Geometry(num_tokens=47, block_length=5, chunk_blocks=2, unit_blocks=4)


def two_corpora(root: Path, kind: str = "counts") -> list[Cache]:
    """Caches of 21 and 10 blocks, each with a padded last one."""
    return [random_cache(root / "prose", kind, 1, PROSE), random_cache(root / "code", kind, 2, CODE)]


def workers(root: Path, units: Sequence[Sequence[int]], kind: str = "counts") -> list[Path]:
    """Unfinished copies of one begun cache of 3 units, each with some units."""
    made = []
    for number, numbers in enumerate(units):
        folder = root / f"worker{number}"
        make_cache(root / "begun", kind, units=range(1))
        shutil.copytree(root / "begun", folder)
        for commit in (folder / "commits").glob("*.json"):
            commit.unlink()
        for shard in (folder / "shards").iterdir():
            shard.unlink()
        for unit in numbers:
            make_cache(folder, kind, units=range(unit, unit + 1))
        made.append(folder)
    return made


def everything(cache: Cache) -> Blocks:
    """All blocks of a cache."""
    return cache.read_blocks(0, cache.num_blocks)


def real_rows(blocks: Blocks) -> SparseTargets:
    """The rows of real tokens."""
    return blocks.targets.take(np.flatnonzero(blocks.valid))


def check_blocks(cache: Cache, sources: Sequence[tuple[Cache, int]]) -> None:
    """Block i of `cache` is exactly the block (cache, number) that `sources` gives, and there are no others."""
    assert cache.num_blocks == len(sources)
    assert cache.num_tokens == sum(int(one.read_blocks(block, block + 1).valid.sum()) for one, block in sources)
    for number, (source, block) in enumerate(sources):
        mine, theirs = cache.read_blocks(number, number + 1), source.read_blocks(block, block + 1)
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        np.testing.assert_array_equal(mine.valid, theirs.valid)
        assert_equal(mine.targets, theirs.targets)


def reopened(root: Path) -> Cache:
    """A cache that `verify` finds nothing wrong with."""
    from logitcache.store import verify

    report = verify(root)
    assert report.ok, report.problems
    assert not report.unfinished
    cache = open_cache(root)
    assert report.tokens == cache.num_tokens
    return cache
