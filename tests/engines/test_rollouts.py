"""Prompts and completions, by several workers: which rows count is the same for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from logitcache.engines.local import run_local
from logitcache.progress import Silent
from logitcache.store import open_cache
from tests.engines.dumps import content, dump
from tests.faults import forkserver, run_to_end, start
from tests.rollouts import SPECS, Rollouts, given

children = forkserver()


def outputs(folder: Path) -> list[tuple[str, Path]]:
    return [(spec, folder / spec) for spec in SPECS]


@pytest.fixture(scope="module")
def alone(rollout_caches: Rollouts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one worker makes."""
    folder = tmp_path_factory.mktemp("alone")
    place = rollout_caches.place
    run_to_end(children, dump, given(place, place / "records.jsonl", *outputs(folder)))
    return folder


def ranked(options: Any, number: int) -> None:
    """What a rank runs."""
    import os

    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2"}
    dump(options)


@pytest.mark.parametrize("engine", ["local", "torchrun"])
def test_two_workers(engine: str, rollout_caches: Rollouts, alone: Path, tmp_path: Path) -> None:
    corpus = rollout_caches.place / "records.jsonl"
    if engine == "local":
        run_local(given(rollout_caches.place, corpus, *outputs(tmp_path), workers=2), Silent(), children)
    else:
        options = given(rollout_caches.place, corpus, *outputs(tmp_path), engine="torchrun")
        ranks: list[Any] = [start(children, ranked, options, number) for number in range(2)]
        for process in ranks:
            process.join()
            assert process.exitcode == 0
    for spec in SPECS:
        assert content(tmp_path / spec) == content(alone / spec)
        assert open_cache(tmp_path / spec).masked
