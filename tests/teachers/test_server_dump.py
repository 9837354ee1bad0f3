"""Dumps through a server: the cache of the same model dumped here, resumable at another address after any end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.errors import ModelError, PlanMismatchError, UsageError
from logitcache.selection import Selection
from logitcache.store import open_cache, verify
from logitcache.targets import SparseTargets
from logitcache.teachers import ServerOptions
from tests.faults import run_killed, run_to_end, start
from tests.teachers.serving import Serving, serving
from tests.test_dump import children, content_of, dump_job, write_corpus

LENGTH = 13
# Half a step of 1/8 nat more or less where two roundings of nearly one number fall to two sides.
WEIGHT_NATS = 3 / 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    write_corpus(folder)
    return folder


def options(teacher: str | Path, corpus: Path, *outputs: tuple[str, Path], **changes: Any) -> DumpOptions:
    """Units of 8 blocks of 13 tokens."""
    settings: dict[str, Any] = {"block_length": LENGTH, "batch_tokens": 3 * LENGTH, "unit_tokens": 8 * LENGTH}
    kept = tuple(Output(Selection.parse(spec), root) for spec, root in outputs)
    return DumpOptions(str(teacher), (str(corpus),), kept, **{**settings, **changes})


def served(url: str, folder: Path, corpus: Path, *outputs: tuple[str, Path], **changes: Any) -> DumpOptions:
    """With the tokenizer in `folder`."""
    quick = ServerOptions(concurrency=2, backoff=0.01, attempts=3)
    return options(url, corpus, *outputs, **{"tokenizer": str(folder), "server": quick, **changes})


def rows_of(root: Path) -> SparseTargets:
    cache = open_cache(root)
    assert verify(root).ok
    return cache.read_blocks(0, cache.num_blocks).targets


@pytest.mark.parametrize("flavour", ["vllm", "echo", "sglang"])
def test_the_cache_is_that_of_the_model_dumped_here(
    server: Serving, served_model: Path, corpus: Path, tmp_path: Path, flavour: str
) -> None:
    """Two selections from the same requests; all but the entropy, which a server does not tell."""
    server.set(flavour=flavour)
    specs = ("top-k:7", "top-p:0.6:40")
    here = [(spec, tmp_path / "here" / spec) for spec in specs]
    there = [(spec, tmp_path / "there" / spec) for spec in specs]
    run_dump(options(served_model, corpus, *here, device="cpu"))
    asked = server.set()["asked"]
    report = run_dump(served(server.url, served_model, corpus, *there))
    # Besides the blocks: one question in each dialect up to the right one, twice one for all that is wanted of a
    # position, and one as long as a block.
    probes = {"vllm": 1, "echo": 2, "sglang": 3}[flavour] + 3
    assert server.set()["asked"] - asked == open_cache(there[0][1]).num_blocks + probes
    for (_, mine), (_, theirs) in zip(here, there, strict=True):
        local, remote = rows_of(mine), rows_of(theirs)
        assert open_cache(theirs).num_tokens == report.tokens
        np.testing.assert_array_equal(remote.ids, local.ids)
        np.testing.assert_array_equal(remote.offsets, local.offsets)
        assert np.abs(np.log(remote.weights / local.weights)).max() <= WEIGHT_NATS
        np.testing.assert_allclose(remote.label_logprob, local.label_logprob, atol=1 / 32)
        np.testing.assert_allclose(remote.tail_mass, local.tail_mass, atol=0.05)
        assert np.isnan(remote.entropy).all()
    tokens = [open_cache(root).read_blocks(0, 2).tokens for root in (here[0][1], there[0][1])]
    np.testing.assert_array_equal(*tokens)


@pytest.fixture(scope="module")
def whole(running: Serving, served_model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache dumped without interruption."""
    running.set(reset=True)
    root = tmp_path_factory.mktemp("whole") / "cache"
    run_to_end(children, dump_job, served(running.url, served_model, corpus, ("top-k:7", root)))
    return root


def test_no_address_in_what_is_written(whole: Path, running: Serving) -> None:
    for path in whole.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert str(running.port).encode() not in data or path.suffix == ".zip"
            assert b"127.0.0.1" not in data


@pytest.mark.parametrize("failpoint", ["commit.after_rename", "commit.after_link"])
def test_a_killed_dump_goes_on_at_another_address(
    server: Serving, served_model: Path, corpus: Path, whole: Path, tmp_path: Path, failpoint: str
) -> None:
    root = tmp_path / "cache"
    run_killed(children, dump_job, served(server.url, served_model, corpus, ("top-k:7", root)), failpoint=failpoint)
    assert not (root / "manifest.json").exists()
    run_to_end(children, dump_job, served(server.other_url, served_model, corpus, ("top-k:7", root)))
    assert content_of(root) == content_of(whole)
    assert verify(root).ok


def test_a_server_that_dies_in_the_middle(
    server: Serving, served_model: Path, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    """What is committed stays; another server finishes it."""
    root = tmp_path / "cache"
    with serving(served_model) as dying:
        # Four questions before the first block, one unit of 8 blocks, and some of the second.
        dying.set(faults=[{}] * (4 + 8 + 2) + [{"do": "die"}])
        with pytest.raises(ModelError, match=r"cannot be reached or breaks off .* the same command goes on"):
            run_dump(served(dying.url, served_model, corpus, ("top-k:7", root)))
    assert len(list((root / "commits").glob("*.json"))) == 1
    assert verify(root).ok
    report = run_dump(served(server.url, served_model, corpus, ("top-k:7", root)))
    assert report.computed_tokens == report.tokens - 8 * LENGTH
    assert content_of(root) == content_of(whole)


@pytest.mark.parametrize("most", [40, 300])
def test_rows_for_completions_only_and_labels_only(
    server: Serving, served_model: Path, tmp_path: Path, most: int
) -> None:
    """Where the whole distribution is told, too. Blocks without a completion are not asked for."""
    lines = [{"prompt": "The cache " * 9, "completion": text} for text in (" keeps what it knew", " ok")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields: dict[str, Any] = {"prompt_field": "prompt", "completion_field": "completion"}
    specs = ("top-k:7", "label", *(("varopt:9",) if most == 300 else ()))
    here = [(spec, tmp_path / "here" / spec) for spec in specs]
    there = [(spec, tmp_path / "there" / spec) for spec in specs]
    pairs = tmp_path / "pairs.jsonl"
    run_dump(options(served_model, pairs, *here, device="cpu", **fields))
    server.set(reset=True, most=most)
    run_dump(served(server.url, served_model, pairs, *there, **fields))
    cache = open_cache(there[0][1])
    asked = server.set()["asked"] - 4
    assert 0 < asked < cache.num_blocks
    for (_, mine), (_, theirs) in zip(here, there, strict=True):
        local, remote = rows_of(mine), rows_of(theirs)
        np.testing.assert_array_equal(remote.ids, local.ids)
        np.testing.assert_array_equal(remote.offsets, local.offsets)
        np.testing.assert_array_equal(np.isnan(remote.label_logprob), np.isnan(local.label_logprob))
        np.testing.assert_allclose(remote.label_logprob, local.label_logprob, atol=1 / 32)


def test_workers_share_a_server(server: Serving, served_model: Path, corpus: Path, whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    run_dump(served(server.url, served_model, corpus, ("top-k:7", root), workers=2))
    assert content_of(root) == content_of(whole)


def test_faults_on_the_way_change_nothing(
    server: Serving, served_model: Path, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    faults: list[dict[str, Any]] = [{}, {"status": 503}, {}, {"do": "hang up"}, {"status": 429, "retry_after": "0"}]
    server.set(faults=[*faults, {}, {}, {"do": "break off"}, {"status": 500}, {}, {"status": 502}] * 2)
    run_dump(served(server.url, served_model, corpus, ("top-k:7", root), server=ServerOptions(backoff=0.01)))
    assert content_of(root) == content_of(whole)


def test_another_model_or_dialect_is_another_plan(
    server: Serving, served_model: Path, corpus: Path, whole: Path
) -> None:
    server.set(names=["tiny", "other"])
    quick = ServerOptions(model="other", backoff=0.01)
    with pytest.raises(PlanMismatchError, match=r"--teacher-model .*the cache has 'tiny', this run 'other'"):
        run_dump(served(server.url, served_model, corpus, ("top-k:7", whole), server=quick))
    server.set(reset=True, flavour="echo")
    with pytest.raises(PlanMismatchError, match=r"teacher.served\): the cache has 'vllm', this run 'echo'"):
        run_dump(served(server.url, served_model, corpus, ("top-k:7", whole)))


def test_an_interrupt_ends_at_once_whatever_is_under_way(
    server: Serving, served_model: Path, corpus: Path, tmp_path: Path
) -> None:
    """All requests stall, for as long as they like."""
    server.set(faults=[{}] * 4 + [{"do": "stall"}] * 100)
    command = [sys.executable, "-m", "logitcache.cli.main", "dump", "--teacher", server.url, "--tokenizer"]
    command += [str(served_model), "--corpus", str(corpus), "--select", "top-k:7", "--block-length", str(LENGTH)]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "cache")], stderr=subprocess.PIPE, text=True)
    server.set(wait_asked=5)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1]
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": None}, "needs its tokenizer here; give its folder or hub id with --tokenizer"),
        ({"dtype": "float32"}, "--dtype says how a teacher runs here"),
        ({"device": "cpu"}, "--device says how a teacher runs here"),
        ({"gguf_file": "a.gguf"}, "--gguf-file says how a teacher runs here"),
        ({"trust_remote_code": True}, "--trust-remote-code says how a teacher runs here"),
    ],
)
def test_options_that_do_not_belong_to_a_server(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        served("http://127.0.0.1:1/v1", tmp_path, corpus, ("top-k:7", tmp_path / "cache"), **changes)


def test_options_that_belong_to_a_server(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="runs here, so no server is asked"):
        options(tmp_path, corpus, ("top-k:7", tmp_path / "cache"), server=ServerOptions(concurrency=2))


def test_the_environment_has_no_key() -> None:
    """What the tests above rely on."""
    assert "LOGITCACHE_API_KEY" not in os.environ


def torchrun_rank(given: DumpOptions, number: int) -> None:
    """What a child runs: a rank that torchrun started."""
    os.environ.update({"RANK": str(number), "WORLD_SIZE": "2"})
    dump_job(given)


def test_ranks_of_torchrun_share_a_server(server: Serving, served_model: Path, corpus: Path, tmp_path: Path) -> None:
    """One is killed on the way; the cache is that of one process."""
    run_dump(served(server.url, served_model, corpus, ("top-k:7", tmp_path / "alone")))
    given = served(server.url, served_model, corpus, ("top-k:7", tmp_path / "shared"), engine="torchrun")
    run_killed(children, torchrun_rank, given, 1, failpoint="commit.after_rename")
    ranks: list[Any] = [start(children, torchrun_rank, given, number) for number in range(2)]
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert content_of(tmp_path / "shared") == content_of(tmp_path / "alone")
