"""How many rows of a cache made of others were left out there as the teacher's logits were not finite.

Legend: R real rows of some blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from logitcache.store import Cache
from logitcache.store.documents import commit_name, read_commit
from logitcache.store.objects import open_objects
from logitcache.store.schema import Commit, parse_document
from logitcache.targets import offsets_of


class LeftOut:
    """Counts them in the chunks of a new cache.

    Where nothing else masks positions, the masks tell these rows. Where a corpus has prompts, they do not: the sources'
    commits have a count for each of their units, which is taken as a whole, for the first of its blocks. It cannot be
    had where a unit is taken in part, unless it is 0.

    Args:
        caches: the sources.
        cache_of, block_of: int64 [blocks], of each block of the new cache the source and its number there.

    Attributes:
        known: whether the rows can be counted.

    Raises:
        DamagedCacheError: a source's commit record is needed, and missing or damaged.
    """

    def __init__(self, caches: Sequence[Cache], cache_of: NDArray[np.int64], block_of: NDArray[np.int64]) -> None:
        self.known = all(cache.manifest.identity.leaves_out_nonfinite for cache in caches)
        told = [cache.manifest.identity.masks_only_nonfinite for cache in caches]
        self._told_by_mask = np.array(told)[cache_of]
        self._taken: dict[int, int] = {}
        for number, cache in enumerate(caches):
            if self.known and not told[number]:
                places = np.flatnonzero(cache_of == number)
                self.known = self._take(cache, places, block_of[places])

    def _take(self, cache: Cache, places: NDArray[np.int64], blocks: NDArray[np.int64]) -> bool:
        """Count the rows of blocks of a cache at their places in the new one. Returns whether that can be done."""
        if cache.num_nonfinite is None:
            return False
        place_of = np.full(cache.num_blocks, -1, dtype=np.int64)
        place_of[blocks] = places
        for first, stop, count in _counts(cache, cache.num_nonfinite):
            taken = place_of[first:stop]
            if count and (taken >= 0).all():
                self._taken[int(taken.min())] = count
            elif count and (taken >= 0).any():
                return False
        return True

    def count(self, first: int, block_tokens: Sequence[int], counted: NDArray[np.bool_]) -> int:
        """Rows left out of the new cache's blocks from `first` on.

        Args:
            block_tokens: real tokens of each block.
            counted: bool [R], the positions that count.
        """
        stop = first + len(block_tokens)
        rows = np.add.reduceat(counted.astype(np.int64), offsets_of(block_tokens)[:-1])
        # A block's last token is the only one without a next.
        missing = (np.array(block_tokens) - 1 - rows)[self._told_by_mask[first:stop]]
        return int(missing.sum()) + sum(self._taken.get(block, 0) for block in range(first, stop))


def _counts(cache: Cache, total: int) -> Iterator[tuple[int, int, int]]:
    """Blocks [first, stop) of a cache and the rows left out there: of its units, or of all of it."""
    manifest = cache.manifest
    if any(step.operation != "convert" for step in manifest.identity.ancestry):
        # Its units have counts of its sources' units.
        yield 0, cache.num_blocks, total
        return
    objects = open_objects(cache.location)
    for shard in manifest.shards:
        record = read_commit(objects, manifest, shard)
        commit = parse_document(record, objects.url(commit_name(shard)), Commit)
        yield shard.first_block, shard.first_block + shard.num_blocks, commit.counters.get("nonfinite", 0)
