"""Killed at any step and run again, every operation gives the bytes of an uninterrupted run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from logitcache.algebra import BlockRanges, Derivation, derive_cache, merge_caches, subset_cache
from logitcache.selection import Selection
from logitcache.store import verify
from tests.algebra.caches import PROSE, two_corpora, workers
from tests.caches import random_cache
from tests.faults import FAILPOINTS, forkserver, run_killed
from tests.store.caches import files_of


def thin(sources: Path, root: Path) -> None:
    derive_cache(sources / "prose", root, Derivation(Selection.parse("sample:4"), ("entropy",), seed=2))


def cut(sources: Path, root: Path) -> None:
    derive_cache(sources / "probabilities", root, Derivation(Selection.parse("top-p:0.9:5")))


def merge(sources: Path, root: Path) -> None:
    merge_caches([sources / "prose", sources / "code"], root)


def unite(sources: Path, root: Path) -> None:
    merge_caches([sources / "worker0", sources / "worker1"], root)


def subset(sources: Path, root: Path) -> None:
    subset_cache(sources / "prose", root, BlockRanges.parse("20,3:15,0"))


OPERATIONS = [thin, cut, merge, unite, subset]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    two_corpora(root)
    random_cache(root / "probabilities", "logprob", 4, PROSE)
    workers(root, [[2], [0, 1]])
    return root


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_killed_again_and_again(operation: Callable[[Path, Path], None], sources: Path, tmp_path: Path) -> None:
    """Each run goes on from where the one before was killed, a step further along the protocol."""
    root = tmp_path / "new"
    for failpoint in FAILPOINTS:
        run_killed(forkserver(), operation, sources, root, failpoint=failpoint)
        assert (root / "manifest.json").exists() == (failpoint == "manifest.written")
    operation(sources, root)
    operation(sources, tmp_path / "whole")
    assert files_of(root) == files_of(tmp_path / "whole")
    assert verify(root).ok
