"""push, pull, and every command that reads, on caches in a bucket."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from logitcache.store import open_cache, push
from tests.caches import Dumped, student_yaml
from tests.cli.conftest import Main
from tests.cli.test_commands import SCRIPT
from tests.runs import rows_of
from tests.s3 import Proxy
from tests.store.caches import files_of

BUCKETS = count()


@pytest.fixture
def url(proxy: Proxy, dumped: Dumped) -> str:
    """The top-k cache, pushed."""
    url = f"{proxy.bucket(f'commands{next(BUCKETS)}')}/cache"
    push(dumped.top_k, url)
    return url


def test_push_and_pull(logitcache: Main, proxy: Proxy, dumped: Dumped, tmp_path: Path) -> None:
    url = f"{proxy.bucket('push-and-pull')}/cache"
    pushed = logitcache("push", dumped.top_k, url)
    assert pushed.status == 0
    assert re.fullmatch(rf"{url}: [\d.]+ MB of [0-9a-f]{{12}}, [\d.]+ MB copied in [\d.]+ s\n", pushed.out)
    assert "push: 100%, " in pushed.err
    again = logitcache("push", dumped.top_k, url)
    assert "0.00 MB copied" in again.out
    assert again.out.endswith("; 8 of 8 files were there\n")
    pulled = logitcache("pull", url, tmp_path / "back", "--json")
    facts = json.loads(pulled.out)
    assert (facts["source"], facts["files"], facts["sent"]) == (url, 8, 8)
    assert facts["fingerprint"] == open_cache(dumped.top_k).fingerprint
    assert files_of(tmp_path / "back") == files_of(dumped.top_k)


def test_commands_that_read(logitcache: Main, url: str, dumped: Dumped, tmp_path: Path) -> None:
    """They print the same, but for the place."""
    lines: list[list[Any]] = [
        ["verify", "--json"],
        ["inspect", "--json"],
        ["inspect", "--position", 40, "--json"],
        ["inspect", "--block", 2],
        ["verify", "--against-teacher", dumped.teacher, "--rows", 60, "--device", "cpu", "--json"],
        ["stats", "--json"],
        ["stats", "--blocks", "3:40"],
    ]
    for command, *options in lines:
        far = logitcache(command, url, *options)
        assert far.status == 0
        near = logitcache(command, dumped.top_k, *options).out
        # Whether shard files are there is not asked of a bucket.
        near = "".join(line for line in near.splitlines(keepends=True) if "shard files" not in line)
        assert far.out.replace(url, str(dumped.top_k)) == near
    for place, out in ((url, "far"), (dumped.top_k, "near")):
        assert logitcache("derive", place, "--select", "top-k:4", "--out", tmp_path / out / "derived").status == 0
        assert logitcache("export", place, "--to", "parquet", "--out", tmp_path / out / "exported").status == 0
    assert files_of(tmp_path / "far" / "derived") == files_of(tmp_path / "near" / "derived")
    assert open_cache(tmp_path / "far" / "derived").fingerprint == open_cache(tmp_path / "near" / "derived").fingerprint


def test_train(logitcache: Main, url: str, dumped: Dumped, tmp_path: Path) -> None:
    losses = []
    for number, place in enumerate((url, dumped.top_k)):
        out = tmp_path / str(number)
        line = ["--student", student_yaml(tmp_path / "student.yaml"), "--out", out, "--max-steps", 2, "--device", "cpu"]
        assert logitcache("train", "--cache", place, *line).status == 0
        losses.append(rows_of(out))
        options = json.loads((out / "run.json").read_text())["options"]
        assert options["cache"] == [str(place)]
    assert losses[0] == losses[1]


def test_dump(logitcache: Main, proxy: Proxy, dumped: Dumped, tmp_path: Path) -> None:
    """Into a bucket and a folder from one run; what is there is read as any cache is."""
    url, folder = f"{proxy.bucket('dumped')}/caches/one", tmp_path / "cache"
    line = ["dump", "--teacher", dumped.teacher, "--corpus", dumped.corpus, "--device", "cpu", "--block-length", 32]
    line += ["--select", "top-k:4", "--out", url, "--also", "sample:5", folder, "--staging", tmp_path / "staging"]
    planned = logitcache(*line, "--dry-run", "--json")
    assert [row["cache"] for row in json.loads(planned.out)["caches"]] == [url, str(folder)]
    assert not (tmp_path / "staging").exists()
    ran = logitcache(*line, "--json")
    facts = json.loads(ran.out)["caches"]
    assert [fact["cache"] for fact in facts] == [url, str(folder)]
    assert [fact["fingerprint"] for fact in facts] == [open_cache(place).fingerprint for place in (url, folder)]
    assert facts[0]["bytes"] == open_cache(url).num_bytes
    assert list((tmp_path / "staging").iterdir()) == []
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "codebook", "commits", "manifest.json", "plan.json", "shards",
    ]  # fmt: skip
    assert "Nothing was left to compute." in logitcache(*line).out
    assert logitcache("verify", url).status == 0
    assert "complete" in logitcache("dump", "--watch", url).out
    assert logitcache("pull", url, tmp_path / "back").status == 0
    other = logitcache(*line, "--seed", 1)
    assert other.status == 1
    assert f"{url} was begun with other arguments" in other.err
    assert "--seed" in other.err
    assert list((tmp_path / "staging").iterdir()) == []
    useless = logitcache("dump", *line[1:-7], "--out", tmp_path / "x", "--staging", tmp_path / "y")
    assert useless.status == 2
    assert "--staging is for caches in a bucket, and no --out is one; leave it out" in useless.sentence


def test_a_dump_that_cannot_begin(logitcache: Main, proxy: Proxy, dumped: Dumped, tmp_path: Path) -> None:
    line = ["dump", "--teacher", dumped.teacher, "--corpus", dumped.corpus, "--select", "top-k:4", "--device", "cpu"]
    line += ["--staging", tmp_path / "staging", "--out"]
    for place, status, says in (
        ("s3://no-such-bucket/cache", 1, "there is no bucket 'no-such-bucket' at http://127.0.0.1"),
        ("gs://bucket/cache", 2, "gs:// is not supported; give a folder, file:// or s3://"),
        ("s3://bucket/../cache", 2, "s3://bucket/../cache names no place in a bucket; write s3://bucket/prefix"),
    ):
        ran = logitcache(*line, place)
        assert ran.status == status
        assert says in ran.sentence
    assert not (tmp_path / "staging").exists()


@pytest.mark.parametrize("command", ["merge", "convert", "gc"])
def test_commands_that_need_a_folder(command: str, logitcache: Main, tmp_path: Path) -> None:
    more = {"merge": ["--out", tmp_path / "out"], "convert": ["--out", tmp_path / "out", "--container", "arrow"]}
    ran = logitcache(command, "s3://bucket/cache", *more.get(command, []))
    assert ran.status == 2
    says = (
        "error: s3://bucket/cache is remote, and this needs a folder; copy it with `logitcache pull s3://bucket/cache"
    )
    assert ran.sentence.startswith(says)


@pytest.mark.parametrize("command", ["derive", "merge", "subset", "convert", "export", "plot", "train"])
def test_nothing_is_written_to_a_url(
    command: str, logitcache: Main, dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines: dict[str, list[Any]] = {
        "derive": [dumped.top_k, "--select", "top-k:4"],
        "merge": [dumped.top_k],
        "subset": [dumped.top_k, "--blocks", "0:2"],
        "convert": [dumped.top_k, "--container", "arrow"],
        "export": [dumped.top_k, "--to", "parquet"],
        "plot": [dumped.top_k],
        "train": ["--cache", dumped.top_k, "--student", student_yaml(tmp_path / "s.yaml"), "--device", "cpu"],
    }
    before = sorted(tmp_path.iterdir())
    ran = logitcache(command, *lines[command], "--out", "s3://bucket/new")
    assert ran.status == 2
    assert "s3://bucket/new cannot be written to directly; give a folder" in ran.sentence
    assert sorted(tmp_path.iterdir()) == before


def refused(
    name: str, proxy: Proxy, dumped: Dumped, url: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], str]:
    """A line that cannot work, and what is said."""
    if name == "credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        return ["inspect", url], "no S3 credentials are found; set AWS_ACCESS_KEY_ID"
    if name == "bucket":
        return ["verify", "s3://no-such-bucket/cache"], "there is no bucket 'no-such-bucket' at http://127.0.0.1"
    if name == "endpoint":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        return ["verify", url], "http://127.0.0.1:9 cannot be reached"
    if name == "no cache":
        return ["inspect", f"{url}/deeper"], "is not a logitcache cache: it has no manifest.json"
    if name == "scheme":
        return ["inspect", "gs://bucket/cache"], "gs:// is not supported; give a folder, file:// or s3://"
    if name == "another cache":
        return ["push", dumped.sample, url], f"holds the cache {open_cache(url).fingerprint}, not "
    return ["pull", url, dumped.corpus], "is a file; choose another folder"


@pytest.mark.parametrize("name", ["credentials", "bucket", "endpoint", "no cache", "scheme", "another cache", "a file"])
def test_one_sentence(
    name: str, logitcache: Main, proxy: Proxy, dumped: Dumped, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, says = refused(name, proxy, dumped, url, monkeypatch)
    ran = logitcache(*line)
    assert ran.status == (2 if name in ("scheme", "a file") else 1)
    assert says in ran.sentence
    assert "access-key" not in ran.err


def test_interrupted(proxy: Proxy, dumped: Dumped) -> None:
    """Ctrl-C ends a push whose connections are silent, and says how to go on."""
    url = f"{proxy.bucket('interrupted')}/cache"
    never = threading.Event()
    fault = proxy.fail("PUT .*/shards/", times=9, until=never)
    pushing = subprocess.Popen([*SCRIPT, "push", str(dumped.top_k), url], stderr=subprocess.PIPE, env=dict(os.environ))
    fault.reached.wait()
    pushing.send_signal(signal.SIGINT)
    _, said = pushing.communicate()
    never.set()
    assert pushing.returncode == 130
    assert b"the same command goes on from there" in said
    push(dumped.top_k, url)
    assert open_cache(url).fingerprint == open_cache(dumped.top_k).fingerprint
