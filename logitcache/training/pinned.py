"""The cache of a run, pinned: what an unfinished dump had written when the run began is what it reads to its end."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from logitcache.store import Cache, open_cache
from logitcache.training.options import TrainOptions


def open_pinned(options: TrainOptions, record: Path) -> Cache:
    """The cache to train on; with `partial`, a snapshot of its first units, as many as the run's record names.

    Args:
        options: of the run.
        record: run.json; a run that has none yet gets all units that are there before a gap.

    Raises:
        CacheError: it cannot be opened, or the units are not there.
    """
    if not options.partial:
        return open_cache(options.cache)
    units = None
    with suppress(OSError, ValueError, TypeError, KeyError):  # a damaged record is refused by who compares it
        units = int(json.loads(record.read_text())["units"])
    return open_cache(options.cache, partial=True).snapshot(units)
