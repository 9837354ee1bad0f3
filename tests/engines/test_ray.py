"""Workers on a real Ray cluster of two nodes, one of which is lost on the way. Runs where Ray is installed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from logitcache.dump import run_dump
from logitcache.engines.leases import Leases, read_leases
from logitcache.engines.owner import known_dead
from logitcache.engines.worker import lease_of
from logitcache.errors import PlanMismatchError, UsageError
from logitcache.progress import Silent, Snapshot
from logitcache.store import Layout, open_cache
from tests.engines.dumps import content, elsewhere, options

pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of this machine, one worker's room on each."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # Actors import this checkout, and take one thread so that equal runs give equal bytes.
        patch.setenv("PYTHONPATH", os.getcwd())
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        made.add_node(num_cpus=1)
        ray.init(address=made.address, log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


class Loses(Silent):
    """Takes a node from the cluster when both workers are at work, and lets the dump end when one took over."""

    def __init__(self, cluster: Any, root: Path, other: Leases) -> None:
        self._cluster, self._root, self._other = cluster, root, other
        self.lost = False

    def workers(self, seen: Snapshot) -> None:
        owners = {lease.owner["pid"]: lease.owner for lease in read_leases(Layout(self._root).leases)}
        owners.pop(os.getpid(), None)
        if not self.lost and len(owners) == 2 and seen.committed_units:
            self._cluster.remove_node(next(iter(self._cluster.worker_nodes)), allow_graceful=False)
            self.lost = True
        elif self.lost and any(known_dead(owner) for owner in owners.values()):
            threading.Thread(target=self._other.__exit__, args=(None, None, None)).start()


def test_a_node_is_lost_on_the_way(cluster: Any, place: Path, whole: Path, tmp_path: Path) -> None:
    """The dump ends with the bytes of a dump by one; an error of an actor is the dump's own."""
    root = tmp_path / "cache"
    last = open_cache(whole).manifest.identity.geometry.num_units - 1
    with elsewhere(Leases(Layout(root).leases)) as other:
        other.claim([lease_of(last)])
        progress = Loses(cluster, root, other)
        report = run_dump(options(place, root, engine="ray", workers=2), progress)
    assert progress.lost
    assert report.tokens == open_cache(root).num_tokens
    assert content(root) == content(whole)
    with pytest.raises(UsageError, match=r"the tokenizer has no BOS token"):
        run_dump(options(place, tmp_path / "other", engine="ray", bos="document"), Silent())


def test_refused_before_a_cluster_is_joined(place: Path, whole: Path) -> None:
    """As test_refused_early.py has it of the other engines."""
    with pytest.raises(PlanMismatchError, match=r"--seed: the cache has 3, this run 4"):
        run_dump(options(place, whole, engine="ray", seed=4), Silent())
    with pytest.raises(UsageError, match=r"^blocks of 129 tokens are longer than the teacher's context of 128;"):
        run_dump(options(place, whole.with_name("new"), engine="ray", block_length=129), Silent())
