"""Creating, resuming and finishing caches; full disks and lost races."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.errors import CacheError, PlanMismatchError, TargetsError, UsageError
from logitcache.store import CacheWriter, TokenFile, open_cache, verify
from logitcache.store.files import publish, replace, write_temporary
from logitcache.store.layout import ContainerKind, Layout
from logitcache.store.schema import most_integers
from tests.faults import run_to_end
from tests.store.caches import CONTAINERS, GEOMETRY, commit, content, files_of, identity, make_cache


@pytest.mark.parametrize("container", CONTAINERS)
def test_equal_content_gives_equal_files(tmp_path: Path, container: ContainerKind) -> None:
    """Also in another order, and with pauses between sessions."""
    whole = make_cache(tmp_path / "whole", container=container)
    tokens, targets = content()
    root, plan = tmp_path / "pieces", identity(container=container)
    commit(CacheWriter.open(root, plan), 0, tokens, targets)
    commit(CacheWriter.open(root, plan), 2, tokens, targets)
    writer = CacheWriter.open(root, plan)
    assert writer.pending_units() == [1]
    with pytest.raises(CacheError, match=r"still lacks 1 unit; run the same dump again$"):
        writer.finalize()
    commit(writer, 1, tokens, targets)
    assert not writer.complete
    writer.finalize()
    assert writer.complete
    assert files_of(root) == files_of(whole.root)


def test_finishing_again_changes_nothing(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache")
    before = files_of(made.root)
    (made.root / "work").mkdir()
    (made.root / "work" / "tokens.bin").write_bytes(b"left by a run that was killed after the manifest")
    manifest = CacheWriter.open(made.root, identity()).finalize()
    assert manifest == open_cache(made.root).manifest
    assert files_of(made.root) == before


def test_another_plan_is_refused(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", units=range(1))
    before = files_of(made.root)
    other = identity(seed=1, geometry=GEOMETRY.model_copy(update={"block_length": 6}))
    with pytest.raises(PlanMismatchError, match=r"was begun with other arguments; repeat those or choose") as caught:
        CacheWriter.open(made.root, other)
    assert caught.value.differences == [("geometry.block_length", 5, 6), ("seed", 0, 1)]
    assert "\n  geometry.block_length: the cache has 5, this run 6\n  seed: the cache has 0, this run 1" in str(
        caught.value
    )
    assert files_of(made.root) == before


def test_folders_that_are_no_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError, match=r"file is a file; choose another folder for --out$"):
        CacheWriter.open(file, identity())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"is not empty and not a logitcache cache \(it holds 'notes.txt'\); choose"):
        CacheWriter.open(folder, identity())
    assert files_of(folder) == {"notes.txt": b"mine"}


def test_what_a_killed_run_leaves_is_no_obstacle(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    (root / "work").mkdir(parents=True)
    (root / "plan.json.abc.tmp").write_bytes(b"half")
    make_cache(root)
    assert verify(root).ok


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    tokens, targets = content()
    writer = CacheWriter.open(tmp_path / "cache", identity())
    writer.publish_pilot(tokens, targets)
    rows = targets.slice(0, 15)
    with pytest.raises(TargetsError, match=r"^token id 400 is outside the vocabulary of 400 ids$"):
        writer.encode(0, np.append(tokens[:14], 400), rows)


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_no_reader_would_take_is_not_written(tmp_path: Path, container: ContainerKind) -> None:
    """At its limit a shard is written and read; one integer over it is refused before there is a file."""
    made = make_cache(tmp_path / "made", container=container)
    cache = open_cache(made.root)
    chunks = [cache.read_planes(ref) for ref in cache.chunks if ref.shard == 0]
    used = sum(plane.size for chunk in chunks for plane in chunk.values())
    room = most_integers(40, cache.manifest.shards[0].num_entries) - used
    writer = CacheWriter.open(tmp_path / "cache", identity(container=container))
    writer.publish_codebook(cache.read_codebook())

    def padded(extra: int) -> list[dict[str, Any]]:
        return [{**chunk, "more": np.zeros(extra if chunk is chunks[0] else 0, int)} for chunk in chunks]

    with pytest.raises(TargetsError, match=r"^a shard's planes hold [\d,]+ integers, over the format's [\d,]+$"):
        writer.commit_unit(0, padded(room + 1))
    assert not writer.layout.shards.exists()
    writer.commit_unit(0, padded(room))
    read = open_cache(tmp_path / "cache", partial=True)
    assert read.read_planes(read.chunks[0])["more"].size == room


# ---------------------------------------------------------------------------------------------- races


def test_a_lost_race_keeps_the_committed_shard(tmp_path: Path) -> None:
    """Two workers compute one unit with different rounding: the first commit stays, byte for byte."""
    tokens, targets = content()
    root = tmp_path / "cache"
    fast, slow = CacheWriter.open(root, identity()), CacheWriter.open(root, identity())
    won = commit(fast, 0, tokens, targets)
    assert won > 0
    record = Layout(root).commit(0).read_bytes()
    other_tokens, other = content(seed=5)
    assert commit(slow, 0, other_tokens, other) == 0
    assert Layout(root).commit(0).read_bytes() == record
    commit(slow, 1, tokens, targets)
    commit(fast, 2, tokens, targets)
    slow.finalize()
    made = make_cache(tmp_path / "alone")
    made.check(open_cache(root).read_blocks(0, 21), 0, 21)
    assert verify(root).ok
    assert (root / "manifest.json").read_bytes() == (made.root / "manifest.json").read_bytes()


def test_workers_that_finish_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster one sweeps away, as a leftover, the manifest that the slower one is about to give its name."""
    made = make_cache(tmp_path / "alone")
    root = tmp_path / "cache"
    fast, slow = CacheWriter.open(root, identity()), CacheWriter.open(root, identity())
    for unit in range(3):
        commit(fast, unit, *content())

    def late(temporary: Path, final: Path) -> None:
        monkeypatch.undo()
        fast.finalize()
        assert not temporary.exists()
        replace(temporary, final)

    monkeypatch.setattr("logitcache.store.writer.replace", late)
    assert slow.finalize() == open_cache(root).manifest
    assert files_of(root) == files_of(made.root)


def test_the_same_unit_twice(tmp_path: Path) -> None:
    tokens, targets = content()
    writer = CacheWriter.open(tmp_path / "cache", identity())
    assert commit(writer, 1, tokens, targets) > 0
    before = files_of(tmp_path / "cache")
    assert commit(writer, 1, tokens, targets) == 0
    assert files_of(tmp_path / "cache") == before


def test_the_first_table_counts(tmp_path: Path) -> None:
    tokens, targets = content()
    one, two = (CacheWriter.open(tmp_path / "cache", identity()) for _ in range(2))
    assert two.codebook() is None
    mine = one.publish_pilot(tokens, targets)
    theirs = two.publish_pilot(tokens[:3], targets.slice(0, 3))
    np.testing.assert_array_equal(mine.ranks.listed, theirs.ranks.listed)


def test_publishing_never_replaces(tmp_path: Path) -> None:
    final = tmp_path / "final"
    for text, won in ((b"first", True), (b"second", False)):
        temporary = write_temporary(tmp_path, "final", lambda path, text=text: path.write_bytes(text))
        assert publish(temporary, final) == won
    assert files_of(tmp_path) == {"final": b"first"}


# ---------------------------------------------------------------------------------------------- full disks


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "link": lambda patch: patch.setattr(os, "link", full),
    "fsync": lambda patch: patch.setattr(os, "fsync", full),
    "rename": lambda patch: patch.setattr(Path, "replace", full),
    "shard": lambda patch: patch.setattr("logitcache.store.writer.write_container", full),
    "record": lambda patch: patch.setattr("logitcache.store.writer.write_temporary_bytes", full),
}


@pytest.mark.parametrize("operation", FULL)
@pytest.mark.parametrize("step", ["open", "commit", "finalize"])
def test_a_full_disk(tmp_path: Path, operation: str, step: str) -> None:
    """The error says what is needed and free; nothing is lost, and a later run ends with the same files."""
    root = tmp_path / "cache"
    tokens, targets = content()
    used = {
        "open": {"link", "fsync", "record"},
        "commit": set(FULL),
        "finalize": {"fsync", "rename", "record"},
    }
    if step != "open":
        make_cache(root, units=range(2 if step == "commit" else 3))
        Layout(root).manifest.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        FULL[operation](patch)
        if operation in used[step]:
            with pytest.raises(CacheError, match=r"^no space to write .*: (about [\d,]+ bytes are needed, )?[\d,]+ "):
                act(root, step, tokens, targets)
        else:
            act(root, step, tokens, targets)
    make_cache(root)
    assert verify(root).ok
    whole = make_cache(tmp_path / "whole")
    wanted = files_of(whole.root)
    assert {name: data for name, data in files_of(root).items() if name in wanted} == wanted


def act(root: Path, step: str, tokens: Any, targets: Any) -> None:
    writer = CacheWriter.open(root, identity())
    if step == "commit":
        commit(writer, 2, tokens, targets)
    elif step == "finalize":
        writer.finalize()


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EACCES])
def test_other_failures_name_the_file_and_the_way_on(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Any, target: Any) -> None:
        raise OSError(code, os.strerror(code), str(target))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(
        CacheError,
        match=rf"plan.json cannot be written \({os.strerror(code)}\); mend it and run the same command again",
    ):
        CacheWriter.open(tmp_path / "cache", identity())
    assert files_of(tmp_path) == {}


def _write_with_a_limit(root: Path, limit: int, container: ContainerKind) -> None:
    """In a child: files may not grow over `limit` bytes, as under a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(CacheError, match=r" cannot be written: a file may not grow so large .* it resumes$"):
        make_cache(root, container=container)


@pytest.mark.parametrize(("limit", "container"), [(100, "zarr"), (2000, "zarr"), (2000, "arrow")])
def test_a_real_limit_on_file_sizes(tmp_path: Path, limit: int, container: ContainerKind) -> None:
    root = tmp_path / "cache"
    run_to_end(multiprocessing.get_context("spawn"), _write_with_a_limit, root, limit, container)
    assert not list(root.rglob("*.tmp"))
    assert not (root / "manifest.json").exists()
    made = make_cache(root, container=container)
    made.check(open_cache(root).read_blocks(0, 21), 0, 21)
    assert files_of(root) == files_of(make_cache(tmp_path / "whole", container=container).root)


# ---------------------------------------------------------------------------------------------- token file


def test_the_token_file(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "work"
    stored = TokenFile(folder)
    stored.prepare()
    np.arange(12, dtype="<i4").tofile(stored.path)
    assert stored.find({"a": 1}) is None
    stored.record({"a": 1}, {"num_tokens": 11})
    again = TokenFile(folder)
    assert again.find({"a": 1}) == {"num_tokens": 11}
    assert again.find({"a": 2}) is None
    np.testing.assert_array_equal(again.read(3, 6), [3, 4, 5])
    assert again.read(3, 6).dtype == np.int64
    np.zeros(12, dtype="<i4").tofile(stored.path)
    assert TokenFile(folder).find({"a": 1}) is None
    stored.prepare()
    assert not (folder / "tokens.json").exists()
    (folder / "tokens.json").write_text("{")
    assert TokenFile(folder).find({"a": 1}) is None
    (tmp_path / "keep").mkdir()
    stored.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]
    shutil.rmtree(tmp_path / "keep")
