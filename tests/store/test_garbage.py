"""`gc`: orphans and temporary files go, what a record names stays, and nothing is taken from a run that writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from logitcache.errors import CacheError, DamagedCacheError
from logitcache.store import CacheWriter, collect_garbage, open_cache, verify
from logitcache.store.layout import ContainerKind, Layout
from tests.store.caches import CONTAINERS, Made, commit, content, files_of, identity, make_cache

LEFT = {
    "manifest.json.a.tmp": b"1",
    "codebook/frequency.b.tmp": b"22",
    "commits/000001.c.tmp": b"333",
    "shards/000000-ffffffffffff.zarr.zip": b"4444",
    "shards/000001-0123456789ab.arrow": b"55555",
    "shards/000002.d.tmp": b"",
}
# What no cache makes is not gc's to remove.
STRANGERS = {"shards/notes.txt": b"mine", "shards/backup.zarr.zip": b"mine", "README.md": b"mine"}


@pytest.fixture(params=CONTAINERS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    return make_cache(tmp_path / "cache", container=request.param)


def litter(root: Path) -> None:
    for name, data in {**LEFT, **STRANGERS}.items():
        (root / name).write_bytes(data)


def test_a_clean_cache_has_nothing_to_remove(made: Made) -> None:
    before = files_of(made.root)
    assert collect_garbage(made.root, delete=True) == []
    assert files_of(made.root) == before


def test_leftovers_are_listed_then_removed(made: Made) -> None:
    before = files_of(made.root)
    litter(made.root)
    littered = files_of(made.root)
    listed = collect_garbage(made.root)
    assert {leftover.file: leftover.num_bytes for leftover in listed} == {name: len(LEFT[name]) for name in LEFT}
    assert {leftover.what for leftover in listed} == {"temporary file", "shard that no record names"}
    assert files_of(made.root) == littered
    assert collect_garbage(made.root, delete=True) == listed
    assert files_of(made.root) == {**before, **STRANGERS}
    assert collect_garbage(made.root) == []
    assert verify(made.root).ok


def test_an_unfinished_cache_keeps_its_commits(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", units=range(2))
    before = files_of(made.root)
    litter(made.root)
    collect_garbage(made.root, delete=True)
    assert files_of(made.root) == {**before, **STRANGERS}
    made.check(open_cache(made.root, partial=True).read_blocks(0, 16), 0, 16)


def test_the_loser_of_a_race_leaves_an_orphan(tmp_path: Path) -> None:
    tokens, targets = content()
    root = tmp_path / "cache"
    writers = [CacheWriter.open(root, identity()) for _ in range(2)]
    commit(writers[0], 0, tokens, targets)
    commit(writers[1], 0, *content(seed=5))
    del writers
    (orphan,) = collect_garbage(root, delete=True)
    assert orphan.file.startswith("shards/000000-")
    assert [path.name for path in (root / "shards").iterdir()] == [
        shard.file for shard in open_cache(root, partial=True).manifest.shards
    ]


def test_a_record_beside_the_manifest_counts(made: Made) -> None:
    """Without the manifest the commits are what names the shards, and without commits the manifest."""
    before = files_of(made.root)
    layout = Layout(made.root)
    layout.manifest.unlink()
    assert collect_garbage(made.root, delete=True) == []
    layout.manifest.write_bytes(before["manifest.json"])
    for path in (*layout.commits.iterdir(), layout.plan):
        path.unlink()
    assert collect_garbage(made.root, delete=True) == []
    assert verify(made.root).tokens == 103


@pytest.mark.parametrize("container", CONTAINERS)
def test_nothing_is_taken_from_a_run(tmp_path: Path, container: ContainerKind) -> None:
    root = tmp_path / "cache"
    writer = CacheWriter.open(root, identity(container=container))
    (root / "shards").mkdir()
    (root / "shards" / "000000.x.tmp").write_bytes(b"half")
    assert len(collect_garbage(root)) == 1
    with pytest.raises(CacheError, match=r"cache is being written; wait until that run ends, then try again$"):
        collect_garbage(root, delete=True)
    del writer
    assert len(collect_garbage(root, delete=True)) == 1
    assert not list((root / "shards").iterdir())


def test_what_is_refused(made: Made, tmp_path: Path) -> None:
    """Where nobody can tell what is named, nothing is removed."""
    folder = tmp_path / "folder"
    (folder / "shards").mkdir(parents=True)
    for name in ("a.tmp", "shards/000000-ffffffffffff.arrow"):
        (folder / name).write_bytes(b"mine")
    with pytest.raises(CacheError, match=r"is not a logitcache cache: it has no manifest.json and no plan.json; give"):
        collect_garbage(folder, delete=True)
    litter(made.root)
    record = Layout(made.root).commit(1)
    data = record.read_bytes()
    record.write_bytes(data[:-9])
    before = files_of(made.root)
    with pytest.raises(DamagedCacheError):
        collect_garbage(made.root, delete=True)
    assert files_of(made.root) == before
    record.write_bytes(data)
    shards = Layout(made.root).shards
    shards.rename(tmp_path / "elsewhere")
    shards.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match=r"shards is a link to somewhere else; run gc on the folder that holds"):
        collect_garbage(made.root, delete=True)


def test_a_link_goes_and_what_it_points_to_stays(made: Made, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"mine")
    (made.root / "shards" / "000000.x.tmp").symlink_to(tmp_path / "precious")
    assert len(collect_garbage(made.root, delete=True)) == 1
    assert (tmp_path / "precious").read_bytes() == b"mine"
