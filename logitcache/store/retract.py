"""Takes commits back, so that the same run computes their units again."""

from __future__ import annotations

from collections.abc import Sequence

from logitcache.store.files import fsync_folder
from logitcache.store.layout import Layout, writing


def take_back(layout: Layout, units: Sequence[int]) -> None:
    """Remove the commits of units, which are pending then, and the manifest that lists them. Shards stay.

    Raises:
        CacheError: the folder cannot be written.
    """
    with writing(layout.root):
        # First the manifest: without it the cache is an unfinished one at every moment.
        layout.manifest.unlink(missing_ok=True)
        fsync_folder(layout.root)
        for unit in units:
            layout.commit(unit).unlink(missing_ok=True)
        if layout.commits.is_dir():
            fsync_folder(layout.commits)
