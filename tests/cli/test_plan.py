"""`logitcache plan` and `dump --dry-run`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from logitcache.cli.console import out
from logitcache.cli.dump import dump
from logitcache.cli.plan import plan
from tests.caches import Dumped, student_yaml
from tests.cli.conftest import Main

CACHE_FIELDS = {
    "select", "codec", "container", "cache", "bytes", "bytes_uncertainty", "bytes_per_token", "tokens_per_second",
    "hours", "gradient_angle", "gradient_variance", "break_even_students", "speed_up", "reader_bytes_per_second",
}  # fmt: skip
FIELDS = {
    "corpus", "caches", "student", "device", "speed_up", "loading_seconds", "tokenising_seconds", "gradient_positions",
    "together", "notes", "total_bytes",
}  # fmt: skip


def line(dumped: Dumped, command: str, *more: object) -> list[object]:
    given = ["--teacher", dumped.teacher, "--corpus", dumped.corpus, "--block-length", 32, "--device", "cpu"]
    return [command, *given, "--max-tokens", 600, "--select", "top-k:4", *more]


def test_table(logitcache: Main, dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out, "_width", 60)
    student = student_yaml(tmp_path / "student.yaml")
    shown = logitcache(*line(dumped, "plan", "--select", "label", "--student", student))
    assert shown.status == 0
    for word in ("top-k:4", "label", "small", "fast", "B/token", "exact", "reads", "600 tokens in 1 file"):
        assert word in shown.out
    assert re.search(r"^label +small .* - ", shown.out, re.MULTILINE), "labels have no gradient's angle"
    assert "…" not in shown.out, "nothing is cut, however narrow the terminal"


def test_json(logitcache: Main, dumped: Dumped) -> None:
    facts = json.loads(logitcache(*line(dumped, "plan", "--codec", "fast", "--json")).out)
    assert facts.keys() == FIELDS
    (cache,) = facts["caches"]
    assert cache.keys() == CACHE_FIELDS
    assert (cache["select"], cache["codec"], cache["cache"]) == ("top-k:4", "fast", None)
    assert facts["corpus"]["tokens"] == 600
    assert facts["total_bytes"] == cache["bytes"]


def test_understands_what_a_dump_is_told() -> None:
    of_dump, of_plan = ({parameter.name for parameter in command.params} for command in (dump, plan))
    where_and_by_whom = {"root", "also", "staging", "engine", "tensor_parallel", "lease_seconds", "watch", "dry_run"}
    assert of_dump - of_plan == where_and_by_whom


def test_dry_run_writes_nothing(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    caches = [tmp_path / "one", tmp_path / "two"]
    arguments = line(dumped, "dump", "--out", caches[0], "--also", "sample:9", caches[1], "--json")
    planned = json.loads(logitcache(*arguments, "--dry-run").out)
    assert os.listdir(tmp_path) == []
    assert planned["together"] is True
    dumped_now = json.loads(logitcache(*arguments).out)
    # What a plan tried is no fact of a dump.
    shared = planned["corpus"].keys() - {"sample_tokens", "whole"}
    assert {name: dumped_now["corpus"][name] for name in shared} == {name: planned["corpus"][name] for name in shared}
    assert dumped_now["corpus"].keys() == shared | {"documents"}
    assert dumped_now["corpus"]["documents"] == 1
    for expected, real in zip(planned["caches"], dumped_now["caches"], strict=True):
        assert (expected["select"], expected["cache"]) == (real["select"], real["cache"])
        assert expected["bytes"] == pytest.approx(real["bytes"], abs=32)


def test_bad_input(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    refused = logitcache(*line(dumped, "plan", "--sample-tokens", 3))
    assert (refused.status, "sample-tokens is 3; it must be at least 256" in refused.err) == (2, True)
    refused = logitcache(*line(dumped, "plan", "--corpus", tmp_path / "nowhere"))
    assert (refused.status, "does not exist" in refused.err) == (1, True)
    refused = logitcache(*line(dumped, "plan", "--select", "top-k:none"))
    assert (refused.status, "is not understood" in refused.err) == (2, True)
