"""Snapshots: the first units of a cache as a cache of its own, while its dump goes on and after."""

from __future__ import annotations

from pathlib import Path

import pytest

from logitcache.errors import CacheError
from logitcache.store import CacheWriter, open_cache
from logitcache.store.layout import Layout
from tests.store.caches import CONTAINERS, commit, content, identity, make_cache


@pytest.mark.parametrize("container", CONTAINERS)
def test_it_stays_while_the_dump_goes_on(tmp_path: Path, container: str) -> None:
    """The writer commits the other units after it was opened, and finishes; a later one of two units is the same."""
    made = make_cache(tmp_path / "cache", units=range(2), container=container)
    growing = open_cache(made.root, partial=True)
    snapshot = growing.snapshot()
    before = snapshot.fingerprint
    assert (snapshot.num_units, snapshot.num_blocks, snapshot.num_tokens) == (2, 16, 80)
    assert (snapshot.is_whole, growing.is_whole) == (True, False)

    tokens, targets = content()
    writer = CacheWriter.open(made.root, identity(container=container))
    commit(writer, 2, tokens, targets)
    for cache in (snapshot, open_cache(made.root, partial=True).snapshot(2)):
        made.check(cache.read_blocks(0, 16), 0, 16)
        assert cache.fingerprint == before
    writer.finalize()
    late = open_cache(made.root).snapshot(2)
    assert (late.fingerprint, late.num_blocks, late.num_tokens) == (before, 16, 80)
    made.check(late.read_blocks(9, 16), 9, 16)
    assert open_cache(made.root).fingerprint != before


def test_blocks_after_it_are_outside(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache")
    for units, blocks in ((1, 8), (2, 16)):
        snapshot = open_cache(made.root).snapshot(units)
        with pytest.raises(CacheError, match=rf"blocks \[7, {blocks + 1}\) are outside .* holds \[0, {blocks}\)$"):
            snapshot.read_blocks(7, blocks + 1)


def test_all_units_are_the_cache(tmp_path: Path) -> None:
    cache = open_cache(make_cache(tmp_path / "cache").root)
    for whole in (cache.snapshot(), cache.snapshot(3)):
        assert whole.manifest == cache.manifest
        assert whole.num_blocks == cache.num_blocks


def test_it_ends_at_the_first_gap(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache")
    Layout(made.root).manifest.unlink()
    Layout(made.root).commit(1).unlink()
    growing = open_cache(made.root, partial=True)
    assert (growing.num_units, growing.snapshot().num_units) == (2, 1)
    with pytest.raises(CacheError, match=rf"^{made.root} has not its first 2 units but 1 yet; wait until its dump has"):
        growing.snapshot(2)


@pytest.mark.parametrize("units", [0, -1, 4])
def test_units_that_are_not_there(tmp_path: Path, units: int) -> None:
    cache = open_cache(make_cache(tmp_path / "cache").root)
    with pytest.raises(CacheError, match=f"has not its first {units} units but 3 yet"):
        cache.snapshot(units)


def test_no_unit_yet(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", units=range(0))
    with pytest.raises(CacheError, match="has none of its units yet; wait until its dump has written more"):
        open_cache(made.root, partial=True).snapshot()
