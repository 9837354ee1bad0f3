"""`--compile`: the same rows from a compiled body, what runs compiled, and compilers that fail."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcache.dump import run_dump
from logitcache.errors import PlanMismatchError
from logitcache.store import open_cache, verify
from logitcache.teachers.compiled import CompiledBody
from tests.caches import corpus_text
from tests.engines.dumps import LENGTH, options
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As few layers and tokens as there can be: compiling takes seconds."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "teacher", num_hidden_layers=1)
    (folder / "corpus.txt").write_text(corpus_text(4))
    return folder


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """By us; torch writes traces."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("logitcache")]


def test_a_dump_with_a_compiled_teacher(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By inductor; the rows are those of the teacher as it is, and the plan says that it was compiled."""
    plain, compiled = options(place, tmp_path / "plain"), options(place, tmp_path / "compiled", compile=True)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    run_dump(plain)
    run_dump(compiled)
    assert said(caplog) == []
    # What is tried first, and the body.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert verify(compiled.outputs[0].root).ok
    caches = [open_cache(given.outputs[0].root) for given in (plain, compiled)]
    teachers = [cache.manifest.identity.teacher for cache in caches]
    assert teachers[1] == {**teachers[0], "compiled": True}
    assert caches[0].num_blocks % 3
    mine, other = (cache.read_blocks(0, cache.num_blocks).targets for cache in caches)
    np.testing.assert_array_equal(mine.ids, other.ids)
    np.testing.assert_allclose(mine.weights, other.weights)
    with pytest.raises(PlanMismatchError, match=r"--compile: the cache has False, this run True"):
        run_dump(options(place, tmp_path / "plain", compile=True))


def test_only_the_expected_batches_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def body(ids: torch.Tensor) -> torch.Tensor:
        log.append("plain")
        return ids

    def compile_(function: object, dynamic: bool) -> object:
        assert (function, dynamic) == (body, False)
        log.append("compile")
        return lambda ids: log.append(f"compiled {len(ids)}") or ids

    monkeypatch.setattr(torch, "compile", compile_)
    compiled = CompiledBody(body)
    for expected, blocks in ((0, 4), (4, 4), (4, 3), (4, 4), (2, 2)):
        if expected:
            compiled.expect(expected)
        compiled(torch.zeros(blocks, LENGTH))
    assert log == ["plain", "compile", "compiled 4", "plain", "compiled 4", "compile", "compiled 2"]


def test_a_body_that_cannot_be_compiled_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """Said once; memory that runs out is not taken for it."""

    def body(ids: torch.Tensor) -> torch.Tensor:
        return ids + 1

    def refuse(*_: object) -> object:
        raise NotImplementedError("not on this machine")

    torch.compiler.reset()
    compiled = CompiledBody(body)
    compiled.expect(2)
    compiled._compiled = torch.compile(body, backend=refuse, dynamic=False)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(compiled(torch.zeros(2, 3)), torch.ones(2, 3))
            compiled.expect(2)
    [what] = said(caplog)
    assert what.startswith("the teacher cannot be compiled (")
    assert what.endswith("NotImplementedError: not on this machine); it runs as it is")

    def too_much(_ids: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    full = CompiledBody(body)
    full.expect(2)
    full._compiled = too_much
    with pytest.raises(torch.OutOfMemoryError):
        full(torch.zeros(2, 3))


def test_no_compiler(place: Path, tmp_path: Path) -> None:
    """One sentence before anything is written."""
    command = [sys.executable, "-m", "logitcache.cli.main", "dump", "--device", "cpu", "--compile", "--json"]
    command += ["--teacher", str(place / "teacher"), "--corpus", str(place / "corpus.txt")]
    command += ["--select", "top-k:3", "--block-length", "16", "--out", str(tmp_path / "cache")]
    # Inductor keeps what it compiled.
    environment = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --compile finds no compiler that torch can use (")
    assert last.endswith("install g++ (or name one in CXX), or leave --compile out")
    assert not (tmp_path / "cache").exists()
    assert ended.stdout == ""
