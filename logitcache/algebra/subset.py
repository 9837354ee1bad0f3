"""`logitcache subset`: chosen blocks of a cache, in a chosen order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from logitcache.algebra.ranges import BlockRanges, spell
from logitcache.algebra.rewrite import Picked, Result, ancestry_of, rewrite
from logitcache.progress import Progress
from logitcache.store import Geometry, open_cache
from logitcache.store.files import digest
from logitcache.store.layout import refuse_sources

# A longer list is recorded by its hash: plan and manifest are read whole.
LONGEST_SPELLING = 4096


def subset_cache(source: str | Path, root: str | Path, ranges: BlockRanges, progress: Progress | None = None) -> Result:
    """Write, or finish, a cache of the chosen blocks of `source`, with the same rows.

    The corpus facts stay those of the source: the text that blocks were taken from.

    Raises:
        UsageError: a block is not there or comes twice.
        CacheError, PlanMismatchError: the source is unfinished, or the folder holds something else.
    """
    root = Path(root)
    cache = open_cache(source)
    refuse_sources(root, [cache.root])
    blocks = ranges.blocks(cache.num_blocks)
    picked = Picked([cache], np.zeros(blocks.size, dtype=np.int64), blocks)
    identity = cache.manifest.identity
    geometry = Geometry.of_blocks(
        picked.tokens_of_blocks(), cache.block_length, identity.geometry.chunk_blocks, identity.geometry.unit_blocks
    )
    spelling = spell(blocks)
    arguments: dict[str, Any] = {"blocks": spelling}
    if len(spelling) > LONGEST_SPELLING:
        arguments = {"num_blocks": int(blocks.size), "blocks_sha256": digest(spelling)}
    ancestry = ancestry_of([cache], "subset", arguments)
    identity = identity.model_copy(update={"geometry": geometry, "ancestry": ancestry})
    return rewrite(root, identity, cache.manifest.origin, picked, progress=progress)
