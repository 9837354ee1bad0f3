"""`convert` and `gc` on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from logitcache.store import open_cache
from tests.caches import Dumped
from tests.cli.conftest import Main


def test_convert(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    out = tmp_path / "arrow"
    shown = logitcache("convert", dumped.sample, "--out", out, "--container", "arrow")
    assert shown.status == 0
    source, cache = open_cache(dumped.sample), open_cache(out)
    sizes = (cache.num_bytes, source.num_bytes)
    assert shown.out == (
        f"{out}: {cache.num_tokens:,} tokens in {sizes[0]:,} bytes (arrow); {dumped.sample} has {sizes[1]:,}\n"
    )
    facts = json.loads(logitcache("convert", dumped.sample, "--out", out, "--container", "arrow", "--json").out)
    assert (facts["bytes"], facts["bytes before"]) == sizes
    assert facts["fingerprint"] == cache.fingerprint != source.fingerprint
    assert logitcache("verify", out).status == 0
    assert json.loads(logitcache("inspect", out, "--json").out)["container"] == "arrow"


def test_convert_refuses(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    same = logitcache("convert", dumped.sample, "--out", tmp_path / "x", "--container", "zarr")
    assert same.status == 2
    assert same.sentence == f"error: {dumped.sample} has container zarr already; choose the other --container"
    absent = logitcache("convert", tmp_path / "no", "--out", tmp_path / "x", "--container", "arrow")
    assert absent.status == 1
    assert "does not exist or is not a folder" in absent.sentence
    file = logitcache("convert", dumped.sample, "--out", tmp_path / "mine", "--container", "arrow")
    assert file.status == 2
    assert file.sentence == f"error: {tmp_path / 'mine'} is a file; choose another folder for --out"
    assert not (tmp_path / "x").exists()


def test_gc(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(dumped.sample, cache)
    assert logitcache("gc", cache).out == f"{cache}: 0 files of 0 bytes left over\n"
    orphan = cache / "shards" / "000000-ffffffffffff.zarr.zip"
    orphan.write_bytes(b"x" * 1234)
    listed = logitcache("gc", cache)
    assert listed.status == 0
    assert "shards/000000-ffffffffffff.zarr.zip" in listed.out
    assert f"{cache}: 1 file of 1,234 bytes left over; --delete removes them" in listed.out
    facts = json.loads(logitcache("gc", cache, "--json").out)
    assert facts["deleted"] is False
    assert orphan.exists()
    facts = json.loads(logitcache("gc", cache, "--delete", "--json").out)
    assert facts == {
        "cache": str(cache),
        "deleted": True,
        "files": [
            {
                "file": "shards/000000-ffffffffffff.zarr.zip",
                "num_bytes": 1234,
                "what": "shard that no record names",
            }
        ],
        "num_bytes": 1234,
    }
    assert not orphan.exists()
    assert logitcache("verify", cache).status == 0


def test_gc_refuses_what_is_no_cache(logitcache: Main, tmp_path: Path) -> None:
    (tmp_path / "a.tmp").write_text("mine")
    refused = logitcache("gc", tmp_path, "--delete")
    assert refused.status == 1
    assert refused.sentence == (
        f"error: {tmp_path} is not a logitcache cache: it has no manifest.json and no plan.json; "
        "give the folder that `dump --out` wrote"
    )
    assert (tmp_path / "a.tmp").exists()
