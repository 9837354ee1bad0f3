"""The caches of a run, pinned: what an unfinished dump had written when the run began is what it reads to its end."""

from __future__ import annotations

from collections.abc import Sequence

from logitcache.store import Cache, open_cache
from logitcache.training.options import TrainOptions


def snapshot_units(options: TrainOptions, recorded: Sequence[int] | None) -> list[int] | None:
    """Units of each cache that a run reads: those of its record, or at its start all that are there before a gap.

    None for a run of finished caches. Raises CacheError where a cache cannot be opened, or those units are not there.
    """
    if not options.partial:
        return None
    if recorded is not None and len(recorded) == len(options.cache):
        return list(recorded)
    return [open_cache(location, partial=True).snapshot().num_units for location in options.cache]


def open_pinned(locations: Sequence[str], units: Sequence[int] | None) -> list[Cache]:
    """The caches to train on: whole ones, or snapshots of so many of their first units. Raises CacheError."""
    if units is None:
        return [open_cache(location) for location in locations]
    return [open_cache(place, partial=True).snapshot(count) for place, count in zip(locations, units, strict=True)]
