"""Thousands of damaged and forged caches, each read in a process with little memory: errors or the right data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from logitcache.store.layout import ContainerKind
from tests.store.caches import CONTAINERS, make_cache
from tests.store.mutations import MUTATIONS

ROUNDS = 205


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_thousand_mutations(tmp_path: Path, container: ContainerKind) -> None:
    made, other = (make_cache(tmp_path / name, seed=seed, container=container) for seed, name in enumerate("ab"))
    command = [sys.executable, "-m", "tests.store.mutations", str(made.root), str(other.root), str(ROUNDS), "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert sum(sum(seen.values()) for seen in result["outcomes"].values()) == ROUNDS * len(MUTATIONS) >= 1000
    for kind, seen in result["outcomes"].items():
        assert seen["refused"] > ROUNDS // 2, kind
    assert result["growth_mb"] < 200, "damage made the reader take memory"
