"""`--device-map` of dump, plan and verify: the same cache, from a teacher that lies on disk."""

from __future__ import annotations

import json
from pathlib import Path

from tests.caches import Dumped
from tests.cli.conftest import Main
from tests.store.caches import files_of


def test_a_teacher_that_lies_on_disk(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    """Nothing that is stored says where the teacher lay: with another map, or none, the same dump goes on."""
    device_map = tmp_path / "map.json"
    device_map.write_text(json.dumps({"": "cpu", "model.layers.1": "disk", "lm_head": "disk"}))
    line = ["--teacher", dumped.teacher, "--corpus", dumped.corpus, "--block-length", 32, "--select", "sample:9"]
    spread, whole = ["--device-map", device_map], ["--device", "cpu"]
    for name, where in {"spread": spread, "whole": whole}.items():
        assert logitcache("dump", *line, *where, "--max-tokens", 2000, "--out", tmp_path / name).status == 0
    assert files_of(tmp_path / "spread") == files_of(tmp_path / "whole")
    again = logitcache("dump", *line, "--device-map", "auto", "--max-tokens", 2000, "--out", tmp_path / "spread")
    assert "Nothing was left to compute" in again.out
    ran = logitcache("verify", tmp_path / "whole", "--against-teacher", dumped.teacher, *spread, "--rows", 100)
    assert (ran.status, "same teacher: " in ran.out) == (0, True)
    ran = logitcache("plan", *line, *spread, "--sample-tokens", 512, "--json")
    assert json.loads(ran.out)["device"].endswith("; the teacher spread over cpu, disk")


def test_bad_input(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    line = ["dump", "--teacher", dumped.teacher, "--corpus", dumped.corpus, "--select", "sample:9", "--out", "c"]
    line += ["--block-length", 32]
    for given in (["fastest"], [tmp_path / "none.json"], ["auto", "--device", "cpu"], ["auto", "--workers", 3]):
        ran = logitcache(*line, "--device-map", *given)
        assert (ran.status, "map" in ran.sentence) == (2, True)
    server = ["dump", "--teacher", "http://127.0.0.1:9/v1", "--tokenizer", dumped.teacher, *line[3:]]
    ran = logitcache(*server, "--device-map", "auto")
    assert (ran.status, "--device-map says how a teacher runs here, and this one runs at a server" in ran.err) == (
        2, True,
    )  # fmt: skip
    ran = logitcache("verify", dumped.top_k, "--device-map", "auto")
    assert (ran.status, "--device-map says how to compare with a teacher" in ran.sentence) == (2, True)
    ran = logitcache(
        "verify", dumped.top_k, "--against-teacher", dumped.teacher, "--device", "cpu", "--device-map", "x"
    )
    assert (ran.status, "leave --device out" in ran.sentence) == (2, True)
