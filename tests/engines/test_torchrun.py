"""Ranks that torchrun or SLURM start: they meet in the cache's folder, and any of them may be missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from logitcache.dump import DumpReport, run_dump
from logitcache.engines.torchrun import Rank
from logitcache.errors import UsageError
from logitcache.progress import Silent, Snapshot
from logitcache.store import open_cache
from tests.engines.dumps import content, options
from tests.faults import forkserver, run_killed, start

children = forkserver()
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        (TORCHRUN, Rank(3, 8, 1)),
        (SLURM, Rank(2, 4, 0)),
        ({**SLURM, **TORCHRUN}, Rank(3, 8, 1)),
        ({"RANK": "0", "WORLD_SIZE": "2"}, Rank(0, 2, 0)),
    ],
)
def test_ranks_of_the_environment(variables: dict[str, str], rank: Rank) -> None:
    assert Rank.of_environment(variables) == rank


@pytest.mark.parametrize("variables", [{}, {"RANK": "0"}, {"SLURM_NTASKS": "4"}])
def test_a_process_that_nobody_started(variables: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"finds neither RANK and WORLD_SIZE nor SLURM_PROCID and SLURM_NTASKS; start"):
        Rank.of_environment(variables)


def test_an_environment_that_makes_no_sense() -> None:
    with pytest.raises(UsageError, match=r"^RANK, WORLD_SIZE and LOCAL_RANK in the environment must be numbers$"):
        Rank.of_environment({**TORCHRUN, "LOCAL_RANK": "first"})


class Heard(Silent):
    """Counts what a rank shows."""

    def __init__(self) -> None:
        self.stages = self.views = 0

    def stage(self, what: str) -> None:
        self.stages += 1

    def workers(self, seen: Snapshot) -> None:
        self.views += 1


def rank(given: Any, variables: dict[str, str], log: Path) -> None:
    """What a child runs."""
    os.environ.update(variables)
    heard = Heard()
    report: DumpReport = run_dump(given, heard)
    shown = int(heard.stages > 0), int(heard.views > 0), int(report.speaks)
    log.write_text(" ".join(map(str, (report.computed_tokens, *shown))))


def test_ranks_share_a_dump(place: Path, whole: Path, tmp_path: Path) -> None:
    """The first speaks for all; a rank that died at its first commit and one that never came are not missed."""
    root = tmp_path / "cache"
    given = options(place, root, engine="torchrun")
    run_killed(
        children, rank, given, {"RANK": "2", "WORLD_SIZE": "4"}, tmp_path / "log", failpoint="commit.after_rename"
    )
    ranks: list[Any] = [
        start(children, rank, given, {"RANK": str(number), "WORLD_SIZE": "4"}, tmp_path / f"log{number}")
        for number in range(2)
    ]
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert content(root) == content(whole)
    first, second = ([int(word) for word in (tmp_path / f"log{number}").read_text().split()] for number in range(2))
    assert first[0] + second[0] == open_cache(root).num_tokens
    assert first[1:] == [1, 1, 1]
    assert second[1:] == [0, 0, 0]


def test_workers_are_counted_by_who_starts_them(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UsageError, match=r"as many workers as torchrun or srun started; leave --workers out$"):
        run_dump(options(place, tmp_path / "cache", engine="torchrun", workers=2))
