"""`logitcache dump --watch`, and the engines' options."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from logitcache.cli import watch as cli_watch
from logitcache.cli.console import err
from logitcache.cli.progress import workers_table
from logitcache.engines.leases import Leases
from logitcache.engines.watch import snapshot
from logitcache.store import Layout, open_cache
from tests.caches import Dumped
from tests.cli.conftest import Main


def begun(dumped: Dumped, root: Path) -> Path:
    """A dump of which two units are not committed."""
    shutil.copytree(dumped.top_k, root)
    (root / "manifest.json").unlink()
    for unit in (4, 6):
        Layout(root).commit(unit).unlink()
    return root


def status_of(unit: int, **more: Any) -> dict[str, Any]:
    return {"stage": "computing", "unit": unit, "in_unit": 64, "computed": 1000, "seconds": 2.0, **more}


def test_one_snapshot(logitcache: Main, dumped: Dumped, tmp_path: Path) -> None:
    """What the leases and the commits say: a worker at work, one that waits, one that is gone."""
    root = begun(dumped, tmp_path / "cache")
    folder = Layout(root).leases
    total, units = open_cache(dumped.top_k).num_tokens, len(open_cache(dumped.top_k).manifest.shards)
    with Leases(folder, "0") as busy, Leases(folder, "1") as waiting, Leases(folder, "10") as gone:
        for number, leases in enumerate((busy, waiting, gone)):
            leases.claim([f"unit-{number:06d}"])
        busy.status = lambda: status_of(4)
        waiting.status = lambda: {"stage": "waiting"}
        gone.status = lambda: status_of(6)
        gone._owner["started"] = "0"
        for leases in (busy, waiting, gone):
            leases.beat()
        before = {path.name for path in folder.iterdir()}
        facts = json.loads(logitcache("dump", "--watch", root, "--json").out)
        assert {path.name for path in folder.iterdir()} == before
        lines = [str(cell) for column in workers_table(snapshot([root])).columns for cell in column.cells]
    committed = total - sum(open_cache(dumped.top_k).manifest.shards[unit].num_tokens for unit in (4, 6))
    assert (facts["complete"], facts["total_tokens"], facts["total_units"]) == (False, total, units)
    assert (facts["done_tokens"], facts["committed_units"]) == (committed + 64, units - 2)
    assert facts["tokens_per_second"] == 500
    assert facts["seconds_left"] == pytest.approx((total - committed - 64) / 500)
    assert [(worker["worker"], worker["stage"], worker["unit"]) for worker in facts["workers"]] == [
        ("0", "computing", 4),
        ("1", "waiting", None),
        ("10", "gone", 6),
    ]
    assert all(worker["pid"] == os.getpid() and worker["heartbeat_age"] >= 0 for worker in facts["workers"])
    assert {"computing", "waiting", "gone", "4", "500"} <= set(lines)


def test_before_there_is_a_plan(logitcache: Main, tmp_path: Path) -> None:
    with Leases(Layout(tmp_path / "cache").leases, "0") as leases:
        leases.status = lambda: {"stage": "tokenising"}
        leases.claim(["tokens"])
        leases.beat()
        facts = json.loads(logitcache("dump", "--watch", tmp_path / "cache", "--json").out)
    assert (facts["complete"], facts["total_tokens"], facts["done_tokens"]) == (False, None, 0)
    assert [worker["stage"] for worker in facts["workers"]] == ["tokenising"]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_view_ends_with_the_dump(
    logitcache: Main, dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    root = begun(dumped, tmp_path / "cache")
    naps = []

    def nap(_seconds: float) -> None:
        naps.append(1)
        shutil.rmtree(root)
        shutil.copytree(dumped.top_k, root)

    monkeypatch.setattr(cli_watch.time, "sleep", nap)
    monkeypatch.setattr(err, "_force_terminal", terminal)
    ran = logitcache("dump", "--watch", root)
    assert ran.status == 0
    assert len(naps) == 1
    assert ran.out == f"{root}: complete, {open_cache(root).num_tokens:,} tokens in 7 units\n"
    assert "5 of 7 units" in ran.err
    assert "nobody works on it" in ran.err


def test_ctrl_c_ends_the_view_only(
    logitcache: Main, dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_watch.time, "sleep", interrupt)
    ran = logitcache("dump", "--watch", begun(dumped, tmp_path / "cache"))
    assert ran.status == 0
    assert ran.err.endswith("Only the view ended; the dump goes on.\n")


def test_wrong_usage(logitcache: Main, dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["dump", "--teacher", dumped.teacher, "--corpus", dumped.corpus, "--select", "top-k:4", "--block-length", 32]
    line += ["--device", "cpu", "--out", tmp_path / "cache"]
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for more, said in (
        (("--engine", "mpi"), "'mpi' is not one of 'local', 'torchrun', 'ray'"),
        (("--engine", "torchrun"), "start the command with torchrun or srun, or use --engine local --workers N"),
        (("--engine", "ray"), 'the engine ray needs Ray; run: pip install "logitcache[ray]"'),
        (("--workers", 0), "workers is 0; it must be at least 1"),
        (("--lease-seconds", 0.1), "lease-seconds is 0.1; it must be a number of at least 1"),
        (("--lease-seconds", "nan"), "lease-seconds is nan; it must be a number of at least 1"),
        (("--watch", tmp_path), "--teacher is of a dump, and --watch only looks at one; leave it out"),
    ):
        ran = logitcache(*line, *more)
        assert ran.status == 2
        assert said in ran.sentence
    nothing = logitcache("dump", "--watch", tmp_path)
    assert nothing.status == 1
    assert "holds no cache and no dump writes one there" in nothing.sentence
    assert list(tmp_path.iterdir()) == []
