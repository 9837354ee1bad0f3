"""`logitcache repair`, from damage to the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from logitcache.store import open_cache
from tests.caches import Dumped
from tests.cli.conftest import Main
from tests.faults import flip_bit
from tests.store.caches import files_of


def test_a_damaged_dump(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    """A byte flips, repair takes the unit back, the same dump computes it and nothing else."""
    line = ["dump", "--teacher", dumped.teacher, "--corpus", dumped.corpus, "--select", "top-k:8", "--device", "cpu"]
    line += ["--block-length", 32, "--unit-tokens", 512, "--out", tmp_path / "cache", "--json"]
    shutil.copytree(dumped.top_k, tmp_path / "cache")
    before = files_of(tmp_path / "cache")
    shard = open_cache(tmp_path / "cache").manifest.shards[3]
    flip_bit(tmp_path / "cache" / "shards" / shard.file, 12345)
    listed = logitcache("repair", tmp_path / "cache")
    assert listed.status == 1
    assert shard.file in listed.out
    assert listed.out.endswith("1 unit to be computed again; --apply takes their commits back\n")
    taken = logitcache("repair", tmp_path / "cache", "--apply", "--json")
    assert taken.status == 0
    facts = json.loads(taken.out)
    assert (facts["applied"], facts["units"], len(facts["repairs"])) == (True, [3], 1)
    ran = logitcache(*line)
    assert ran.status == 0
    assert json.loads(ran.out)["computed_tokens"] == shard.num_tokens
    assert files_of(tmp_path / "cache") == before
    whole = logitcache("repair", tmp_path / "cache")
    assert (whole.status, whole.out) == (0, f"{tmp_path / 'cache'}: nothing is damaged\n")


def test_a_damaged_plan(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    """No unit is lost with it, and none is spoken of."""
    shutil.copytree(dumped.top_k, tmp_path / "cache")
    flip_bit(tmp_path / "cache" / "plan.json", 100)
    listed = logitcache("repair", tmp_path / "cache")
    assert listed.status == 1
    assert listed.out.endswith("nothing is to be taken back of what was computed; --apply mends the files\n")
    assert logitcache("repair", tmp_path / "cache", "--apply").out.endswith("made the cache again to finish it\n")


def test_no_cache(logitcache: Main, tmp_path: Path) -> None:
    assert "is not a logitcache cache: it holds no plan.json" in logitcache("repair", tmp_path).sentence
    refused = logitcache("repair", "s3://bucket/cache")
    assert refused.status == 2
    assert "error: " in refused.err
