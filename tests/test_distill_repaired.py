"""A cache that is damaged under a running training: repaired and dumped again, the training goes on to the same end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.errors import CacheError, DamagedCacheError
from logitcache.selection import Selection
from logitcache.store import open_cache, repair
from tests.caches import BLOCK_LENGTH, Dumped, student_yaml
from tests.faults import flip_bit
from tests.short_runs import assert_same_run, eight_steps, train


class Stopped(Exception):
    """The run ends here."""


def stop(step: int, total: int, metrics: dict[str, float]) -> None:
    if step == 5:
        raise Stopped


@pytest.mark.usefixtures("one_thread")
def test_repaired_between_two_runs(dumped: Dumped, tmp_path: Path) -> None:
    student, root = student_yaml(tmp_path / "student.yaml"), tmp_path / "cache"
    shutil.copytree(dumped.top_k, root)
    values = eight_steps(dumped, student, tmp_path / "out") | {"cache": str(root)}
    train(values, out=str(tmp_path / "whole"))
    with pytest.raises(Stopped):
        train(values, progress=stop)
    for shard in open_cache(root).manifest.shards:
        flip_bit(root / "shards" / shard.file, 4 * shard.num_bytes)
    with pytest.raises(DamagedCacheError, match="its SHA-256 differs"):
        train(values, resume=True)
    assert repair(root, apply=True)
    with pytest.raises(CacheError, match="is unfinished; run the command that began it again to finish it"):
        train(values, resume=True)
    run_dump(
        DumpOptions(
            teacher=str(dumped.teacher),
            corpus=(str(dumped.corpus),),
            outputs=(Output(Selection.parse("top-k:8"), root),),
            device="cpu",
            block_length=BLOCK_LENGTH,
            unit_tokens=512,
        )
    )
    train(values, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "out")
