"""The caches of a run, pinned: what an unfinished dump had written when the run began is what it reads to its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from logitcache.store import Cache, open_cache


def open_pinned(locations: Sequence[str], partial: bool, record: Path) -> list[Cache]:
    """The caches to train on; with `partial`, snapshots of their first units, as many as the run's record names.

    Args:
        locations: of the caches.
        partial: whether they may be unfinished.
        record: run.json, whose `units` has one number for each cache; a run that has none yet gets all units that are
            there before a gap.

    Raises:
        CacheError: one cannot be opened, or the units are not there.
    """
    if not partial:
        return [open_cache(location) for location in locations]
    units: list[int | None] = [None] * len(locations)
    with suppress(OSError, ValueError, TypeError, KeyError):  # a damaged record is refused by who compares it
        recorded = [int(count) for count in json.loads(record.read_text())["units"]]
        units = [*recorded, *units][: len(units)]
    return [open_cache(place, partial=True).snapshot(count) for place, count in zip(locations, units, strict=True)]
