"""run_training by several processes: the same run as by one, however it is interrupted and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.caches import BLOCK_LENGTH, Dumped, corpus_text, student_yaml
from tests.runs import result_of, rows_of, weights_of
from tests.train_ranks import Job, Nursery

ROOT = Path(__file__).parent.parent
STEPS = 8
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]


@pytest.fixture(scope="module")
def options(dumped: Dumped, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a run of 8 steps over 128 blocks; the cache has 108, the last of them short.

    So ranks and accumulated batches count different numbers of labels. Each rank evaluates 4 blocks at a time: 27
    batches of one cache and 3 of another domain, which two ranks cannot share evenly.
    """
    folder = tmp_path_factory.mktemp("options")
    (folder / "other.txt").write_text(corpus_text(11, first=500))
    return {
        "cache": str(dumped.top_k),
        "held_out_cache": str(dumped.sample),
        "eval_text": str(folder / "other.txt"),
        "student": str(student_yaml(folder / "student.yaml")),
        "max_steps": STEPS,
        "batch_tokens": 8 * BLOCK_LENGTH,
        "accumulate": 2,
        "log_every": 2,
        "save_every": 2,
        "eval_every": 4,
        "learning_rate": 1e-2,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def alone(nursery: Nursery, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that all others must equal."""
    folder = tmp_path_factory.mktemp("alone")
    assert nursery(Job(options | {"out": str(folder / "out")}, world=0, folder=folder)) == [0]
    return folder / "out"


def assert_same_run(out: Path, alone: Path) -> None:
    """Metrics and results to 1e-5, weights to what Adam makes of such gradients; the same files."""
    rows, expected = rows_of(out), rows_of(alone)
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    assert len([row for row in rows if "eval_other_ce" in row]) == 2
    for row, theirs in zip(rows, expected, strict=True):
        assert row == pytest.approx(theirs, rel=1e-5)
    assert result_of(out) == pytest.approx(result_of(alone), rel=1e-5)
    weights, theirs = weights_of(out), weights_of(alone)
    assert weights.keys() == theirs.keys()
    for name, weight in weights.items():
        assert torch.allclose(weight, theirs[name], rtol=1e-5, atol=1e-5), name
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}
    assert (out / "config.json").read_text() == (alone / "config.json").read_text()


def torchrun(*arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*TORCHRUN, *map(str, arguments)], env=environment, capture_output=True, text=True)


def test_torchrun_loses_a_rank_and_resumes(options: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    """The real launcher and command line: rank 1 is killed, torchrun ends rank 0, and --resume ends the run."""
    config = tmp_path / "train.json"
    config.write_text(json.dumps(options | {"out": str(tmp_path / "out"), "report_to": "tensorboard"}))
    killed = torchrun(ROOT / "tests" / "train_ranks.py", 5, "train", "--config", config)
    assert killed.returncode == 1
    assert "exitcode  : -9" in killed.stderr
    assert "error: unexpected" not in killed.stderr
    assert not (tmp_path / "out" / "result.json").exists()
    resumed = torchrun("-m", "logitcache.cli.main", "train", "--config", config, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    # One process speaks: one table, one view.
    assert resumed.stdout.count("eval ce") == 1
    assert {line[:6] for line in resumed.stderr.splitlines()} == {"train:"}
    logs = [path for path in (tmp_path / "out").rglob("*tfevents*") if path.is_file()]
    assert len(logs) == 2  # of the main rank, before and after
    assert b"train/divergence" in logs[-1].read_bytes()
    assert_same_run(tmp_path / "out", alone)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["world_size"] == 2
    assert record["command"][1:] == ["train", "--config", str(config)]


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2), (2, 1)])
def test_resumed_with_another_number(
    before: int, after: int, nursery: Nursery, options: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    """The whole group is killed after step 5; those that go on read what it would have read."""
    values = options | {"out": str(tmp_path / "out")}
    kill = dict.fromkeys(range(max(1, before)), 5)
    assert set(nursery(Job(values, before, kill=kill, folder=tmp_path))) == {-signal.SIGKILL}
    assert set(nursery(Job(values, after, resume=True, folder=tmp_path))) == {0}
    assert (tmp_path / "err0").read_text() == ""
    assert_same_run(tmp_path / "out", alone)


@pytest.mark.parametrize("fsdp", ["full-shard", "shard-grad-op"])
def test_sharded(fsdp: str, nursery: Nursery, options: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    """FSDP: killed after step 5 and resumed; its student is whole."""
    values = options | {"out": str(tmp_path / "out"), "fsdp": fsdp}
    job = Job(values, shard=True, folder=tmp_path)
    if fsdp == "full-shard":
        assert nursery(Job(values, shard=True, kill={0: 5, 1: 5}, folder=tmp_path)) == [-signal.SIGKILL] * 2
        job = Job(values, shard=True, resume=True, folder=tmp_path)
    assert nursery(job) == [0, 0], (tmp_path / "err0").read_text()
    assert (tmp_path / "err0").read_text() == ""
    assert_same_run(tmp_path / "out", alone)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(student).__name__ == "LlamaForCausalLM"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fsdp", ["off", "full-shard"])
def test_on_gpus(fsdp: str, options: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    """Over NCCL, by one process for each GPU up to two; to the rounding of another device."""
    config = tmp_path / "train.json"
    config.write_text(json.dumps(options | {"out": str(tmp_path / "out"), "device": "cuda", "fsdp": fsdp}))
    processes = ["--nproc-per-node", min(2, torch.cuda.device_count())]
    for more in ([], ["--resume"]):
        ran = torchrun(*processes, "-m", "logitcache.cli.main", "train", "--config", config, *more)
        assert ran.returncode == 0, ran.stderr
    for name in ("loss", "ce", "divergence", "eval_ce", "eval_kl", "eval_other_ce"):
        ours, theirs = ([row[name] for row in rows_of(out) if name in row] for out in (tmp_path / "out", alone))
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaForCausalLM"


def test_a_refusal_is_said_once(nursery: Nursery, options: dict[str, Any], tmp_path: Path) -> None:
    """By the main rank; the others end alike."""
    config = tmp_path / "train.json"
    config.write_text(json.dumps(options | {"out": str(tmp_path / "out")}))
    for given, status, words in (
        (
            ["--batch-tokens", "96"],
            2,
            "96 is 3 blocks of 32 tokens a batch, which 2 processes cannot share evenly; use --batch-tokens 64",
        ),
        (["--set", "fsdp=full-shard"], 2, "accelerate shards on no CPU"),
        (["--alpha", "3"], 2, "less than or equal to 1"),
        (["--alpa", "3"], 2, "No such option"),
    ):
        command = ["train", "--config", str(config), *given]
        assert nursery(Job(command=command, folder=tmp_path)) == [status, status]
        assert words in (tmp_path / "err0").read_text()
        assert [(tmp_path / name).read_text() for name in ("out0", "out1", "err1")] == ["", "", ""]
        assert not (tmp_path / "out").exists()


def test_what_one_rank_refuses_ends_all(nursery: Nursery, options: dict[str, Any], tmp_path: Path) -> None:
    values = options | {"out": str(tmp_path / "out")}
    other = {1: {"cache": str(tmp_path / "nothing")}}
    assert nursery(Job(values, on_rank=other, folder=tmp_path)) == [1, 1]
    assert "TrainingError: on rank 1: " in (tmp_path / "err0").read_text()
    assert "nothing does not exist" in (tmp_path / "err1").read_text()
    assert nursery(Job(values, on_rank={1: {"cache": options["held_out_cache"]}}, folder=tmp_path)) == [1, 1]
    assert "TrainingError: rank 1 has another cache than rank 0" in (tmp_path / "err0").read_text()
    assert not (tmp_path / "out").exists()


def test_half_an_environment_is_refused(nursery: Nursery, tmp_path: Path) -> None:
    """accelerate would wait for processes that nobody started."""
    command = ["train", "--student", "s", "--cache", "c", "--out", str(tmp_path / "out")]
    for environment in ({"WORLD_SIZE": "2"}, {"LOCAL_RANK": "0"}):
        job = Job(world=0, command=command, environment=environment, folder=tmp_path)
        assert nursery(job) == [2]
        assert "must be set together, as torchrun does" in (tmp_path / "err0").read_text()
