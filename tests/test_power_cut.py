"""A dump that loses power at any moment: what was not fsynced is gone, and the same line ends with the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from logitcache.dump import run_dump
from logitcache.store import Layout, open_cache, verify
from logitcache.teachers import TransformersTeacher
from tests.engines.dumps import let_expire
from tests.store.caches import files_of
from tests.store.test_io_faults import Disk, entries
from tests.test_dump import content_of, options, write_corpus
from tests.tiny import save_tiny


class EagerDisk(Disk):
    """A file system that makes names durable before anybody asks for it, and contents only when they are fsynced."""

    def _left(self, folder: Path, prefix: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for name, inode in entries(folder).items() if folder.is_dir() else ():
            if inode is None:
                found |= self._left(folder / name, f"{prefix}{name}/")
            else:
                found[f"{prefix}{name}"] = self._contents.get(inode, b"")
        return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("disk", [Disk, EagerDisk])
def test_a_dump_loses_power_at_any_moment(tmp_path: Path, disk: type[Disk]) -> None:
    """Two outputs of one dump, its token file and its leases among what is cut."""
    save_tiny(tmp_path / "teacher")
    write_corpus(tmp_path / "corpus")
    root = tmp_path / "both"
    given = options(tmp_path, ("sample:11", root / "a"), ("top-k:7", root / "b"))
    teacher = TransformersTeacher.load(given.teacher, device="cpu")
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        kept = disk(root, patch)
        run_dump(given, teacher=teacher)
    wanted = {name: content_of(root / name) for name in "ab"}
    assert all({f"{name}/{file}" for file in wanted[name]} <= set(kept.moments[-1]) for name in "ab")
    moments = [moment for number, moment in enumerate(kept.moments) if moment not in kept.moments[:number]]
    assert len(moments) >= 15
    for moment in moments:
        shutil.rmtree(root)
        for name, data in moment.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        for name in "ab":
            if (root / name / "plan.json").exists():
                report = verify(root / name)
                assert report.ok, report.problems
                assert report.shards == len(list((root / name / "commits").glob("*.json")))
        if Layout(root / "a").leases.exists():
            # Whoever held them is gone with the power.
            let_expire(Layout(root / "a").leases)
        run_dump(given, teacher=teacher)
        assert {name: content_of(root / name) for name in "ab"} == wanted
        assert verify(root / "b").ok
        assert open_cache(root / "a").manifest.complete
        assert not [name for name in files_of(root) if name.endswith(".tmp")]
