"""One teacher of two ranks over gloo: the rows of the teacher in one process, resumed, and ended by whoever dies."""

from __future__ import annotations

import os
import re
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from logitcache.dump import run_dump
from logitcache.engines.leases import Leases
from logitcache.engines.worker import lease_of
from logitcache.errors import LogitcacheError, UsageError
from logitcache.planning import PlanOptions
from logitcache.store import Layout, open_cache
from tests.engines.dumps import await_state, content, dump, elsewhere, options
from tests.faults import forkserver, run_to_end, start
from tests.tiny import save_tiny

children = forkserver()
RANKS = 2


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The caches of a teacher in one process."""
    run_to_end(children, dump, options(place, place / "undivided", ("top-k:8", place / "undivided-k")))
    return place / "undivided"


def given(place: Path, root: Path, **changes: Any) -> Any:
    more = [("top-k:8", root.with_name(f"{root.name}-k"))]
    return options(place, root, *more, engine="torchrun", device="auto", tensor_parallel=True, **changes)


def rank(number: int, meeting: Path, told: Any, log: Path) -> None:
    """What a child runs: what torchrun would set, and a rendezvous without ports."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", f"file://{meeting}", timedelta(minutes=3), rank=number, world_size=RANKS)
    try:
        report = run_dump(told)
    except LogitcacheError as error:
        log.write_text(f"{type(error).__name__} {error}")
        os._exit(3)
    log.write_text(f"{report.computed_tokens} {report.speaks}")


def launch(folder: Path, told: Any) -> tuple[list[Any], list[Path]]:
    """Both ranks, started, and where they say how they ended."""
    folder.mkdir()
    logs = [folder / f"log{number}" for number in range(RANKS)]
    ranks = [start(children, rank, number, folder / "meeting", told, log) for number, log in enumerate(logs)]
    return ranks, logs


def ended(ranks: list[Any]) -> list[int]:
    """Exit codes. Whoever hangs hangs the test."""
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]


@pytest.fixture(scope="module")
def parallel(place: Path, whole: Path) -> Path:
    """The caches of a teacher of two ranks."""
    ranks, logs = launch(place / "launch", given(place, place / "parallel"))
    assert ended(ranks) == [0, 0]
    tokens = open_cache(place / "parallel").num_tokens
    assert [log.read_text() for log in logs] == [f"{tokens} True", "0 False"]
    return place / "parallel"


def test_rows_are_those_of_one_process(whole: Path, parallel: Path) -> None:
    """To rounding: sums over slices have another order, and what is stored has few digits."""
    for suffix, least in (("", 0.9), ("-k", 0.98)):
        one, other = (open_cache(f"{root}{suffix}").read_blocks(0, 62).targets for root in (whole, parallel))
        for column in ("label_logprob", "entropy"):
            theirs, ours = (getattr(targets, column) for targets in (one, other))
            np.testing.assert_allclose(ours, theirs, rtol=5e-3, atol=5e-3)
            assert (np.isnan(ours) | (ours == theirs)).mean() > 0.98
        rows = [
            [(*targets.ids[low:high], *targets.weights[low:high]) for low, high in spans(targets)]
            for targets in (one, other)
        ]
        assert np.mean([ours == theirs for ours, theirs in zip(*rows, strict=True)]) > least


def spans(targets: Any) -> Any:
    return zip(targets.offsets[:-1], targets.offsets[1:], strict=True)


@pytest.mark.parametrize("dies", range(RANKS))
def test_a_rank_dies(place: Path, parallel: Path, tmp_path: Path, dies: int) -> None:
    """The other says so and ends; the same launch goes on where they were."""
    root = tmp_path / "cache"
    told, last = given(place, root), open_cache(parallel).manifest.identity.geometry.num_units - 1
    with elsewhere(Leases(Layout(root).leases)) as other:
        # It cannot end before one of its ranks has died.
        other.claim([lease_of(last)])
        ranks, logs = launch(tmp_path / "first", told)
        await_state(root, lambda seen: seen.committed_units == last)
        os.kill(ranks[dies].pid, signal.SIGKILL)
        ranks[dies].join()
    codes = ended(ranks)
    assert (codes[dies], codes[1 - dies]) == (-signal.SIGKILL, 3)
    assert logs[1 - dies].read_text().startswith("ModelError the teacher's ranks lost each other in a forward pass (")
    ranks, logs = launch(tmp_path / "second", told)
    assert ended(ranks) == [0, 0]
    # The last unit, and perhaps the one before for the other cache.
    assert 0 < int(logs[0].read_text().split()[0]) <= 2 * told.unit_tokens
    assert content(root) == content(parallel)


def test_what_needs_no_teacher_is_refused_by_every_rank(place: Path, parallel: Path, tmp_path: Path) -> None:
    ranks, logs = launch(tmp_path / "launch", given(place, parallel, seed=4))
    assert ended(ranks) == [3, 3]
    assert all("--seed: the cache has 3, this run 4" in log.read_text() for log in logs)


def test_an_error_of_rank_0_ends_the_others(place: Path, parallel: Path, tmp_path: Path) -> None:
    ranks, logs = launch(tmp_path / "launch", given(place, parallel, bos="document"))
    assert ended(ranks) == [3, 3]
    assert logs[0].read_text().startswith("UsageError bos='document' was asked for, but the tokenizer has no BOS")
    assert logs[1].read_text().startswith("ModelError rank 0 of the teacher ended with an error; what it said")


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        (
            "gpt2",
            {},
            r"^ModelError transformers has no plan to split .*/teacher over ranks; spread it with --device-map",
        ),
        (
            "llama",
            {"num_key_value_heads": 1},
            r"^ModelError the teacher's 1 key value heads cannot be shared by 2 ranks;",
        ),
    ],
)
def test_a_model_that_cannot_be_split(tmp_path: Path, family: str, config: dict[str, int], said: str) -> None:
    save_tiny(tmp_path / "teacher", family, **config)
    (tmp_path / "corpus.txt").write_text("some text")
    ranks, logs = launch(tmp_path / "launch", given(tmp_path, tmp_path / "cache"))
    assert ended(ranks) == [3, 3]
    for log in logs:
        assert re.search(said, log.read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "local"}, r"^--tensor-parallel makes one teacher of all ranks that torchrun starts; add --engine"),
        ({"device": "cpu"}, r"^--tensor-parallel settles where the teacher runs; leave --device and --device-map out$"),
        ({"device_map": "auto"}, r"^--tensor-parallel settles where the teacher runs; leave"),
    ],
)
def test_what_it_does_not_go_with(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    told = {"engine": "torchrun", "device": "auto", "tensor_parallel": True, **changes}
    with pytest.raises(UsageError, match=message):
        options(tmp_path, tmp_path / "cache", **told)


def test_a_plan_is_made_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^plan tries the teacher in one process; leave --tensor-parallel out"):
        PlanOptions(given(tmp_path, tmp_path / "cache"))


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "there is one",
        ),
    ],
)
def test_ranks_that_cannot_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], found: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UsageError, match=rf"one teacher of several ranks, and {found}; start the command with torchrun"
    ):
        run_dump(given(tmp_path, tmp_path / "cache"))
