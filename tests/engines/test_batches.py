"""How large a teacher's batches are: as given, halved where memory runs out, found by trial."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcache import dump_batches
from logitcache.dump import run_dump
from logitcache.dump_batches import TRIES, Batches
from logitcache.errors import UsageError
from logitcache.store import open_cache, verify
from logitcache.teachers import TransformersTeacher
from tests.engines.dumps import LENGTH, options
from tests.engines.test_memory import Notes, in_python, room_for


class OnAGpu:
    """What a trial asks of a teacher."""

    blocks_at_once = 1
    device = torch.device("cuda")


def found(
    place: Path, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], room: int = 1 << 20, longest: int = 64
) -> tuple[list[int], list[str], int]:
    """Sizes that a trial goes through, what it says, and the size in the end, where a batch of n blocks takes
    `seconds[n]`; the first of each size takes ten times as long.
    """
    now, fresh, notes, sizes = [0.0], set(seconds), Notes(), []
    monkeypatch.setattr(dump_batches, "device_clock", lambda device: now[0])
    given = options(place, place / "never", batch_tokens="auto", block_length=1024)
    batches = Batches.of(given, OnAGpu(), longest, notes)  # type: ignore[arg-type]

    def work(size: int) -> int:
        if size > room:
            in_python()
        now[0] += seconds[size] * (10 if size in fresh else 1)
        fresh.discard(size)
        return size

    for number in itertools.count():
        if not batches.trying:
            break
        sizes.append(batches.blocks)
        # A batch of another size, as a chunk's last one, says nothing.
        assert batches.attempt(lambda: 1, batches.blocks + 1, number) == 1
        batches.attempt(lambda size=sizes[-1]: work(size), sizes[-1], number)  # type: ignore[misc]
    return sizes, notes.said, batches.blocks


def test_doubled_until_it_is_hardly_faster(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 1.0, 2: 1.2, 4: 1.8, 8: 3.5, 16: 7.0}
    sizes, said, blocks = found(place, monkeypatch, seconds)
    assert sizes == [size for size in (1, 2, 4, 8) for _ in range(TRIES)]
    assert blocks == 4
    assert said == ["4,096 tokens at a time, as found by trial (--batch-tokens 4096)"]


def test_never_longer_than_a_chunk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, said, blocks = found(place, monkeypatch, dict.fromkeys((1, 2, 4, 8), 1.0), longest=9)
    assert max(sizes) == blocks == 8
    assert said == ["8,192 tokens at a time, as found by trial (--batch-tokens 8192)"]


def test_a_trial_that_runs_out_of_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, said, blocks = found(place, monkeypatch, dict.fromkeys((1, 2, 4, 8), 1.0), room=4)
    assert (max(sizes), blocks) == (8, 4)
    assert said == ["8 blocks at a time are too much for the teacher's memory; going on with 4 (--batch-tokens 4096)"]


@pytest.mark.usefixtures("one_thread")
def test_a_trial_loses_no_rows(
    place: Path, teacher: TransformersTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batches are the dump's: every block is computed once, and what is drawn is what other batches draw."""
    notes = Notes()
    now = itertools.count()
    monkeypatch.setattr(dump_batches, "device_clock", lambda device: float(next(now)))
    monkeypatch.setattr(
        Batches, "of", classmethod(lambda cls, options, teacher, longest, told: cls(1, LENGTH, told, longest))
    )
    with room_for(teacher, 64, in_python) as tried:
        report = run_dump(options(place, tmp_path / "auto", batch_tokens="auto"), notes, teacher)
    monkeypatch.undo()
    num_blocks = open_cache(tmp_path / "auto").num_blocks
    assert sum(tried) == num_blocks
    # Every batch takes the same time: twice as many blocks are twice as fast, as long as a chunk has them.
    assert max(tried) == 4
    assert report.batch_tokens == 4 * LENGTH
    assert notes.said == ["64 tokens at a time, as found by trial (--batch-tokens 64)"]
    run_dump(options(place, tmp_path / "one", batch_tokens=LENGTH), teacher=teacher)
    mine, other = (open_cache(tmp_path / name).read_blocks(0, num_blocks).targets for name in ("auto", "one"))
    np.testing.assert_array_equal(mine.ids, other.ids)
    np.testing.assert_allclose(mine.weights, other.weights)
    assert verify(tmp_path / "auto").ok


def test_without_a_gpu_nothing_is_tried(place: Path, teacher: TransformersTeacher, tmp_path: Path) -> None:
    notes = Notes()
    report = run_dump(options(place, tmp_path / "cache", batch_tokens="auto"), notes, teacher)
    # 4,096 tokens are usual, and a unit has no more than these.
    assert report.batch_tokens == open_cache(tmp_path / "cache").manifest.identity.geometry.unit_blocks * LENGTH
    assert notes.said == []


@pytest.mark.parametrize("wrong", ["many", "", "4k"])
def test_neither_a_number_nor_auto(place: Path, tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(UsageError, match=rf"^batch-tokens is '{wrong}'; give a number of tokens, or auto$"):
        options(place, tmp_path / "cache", batch_tokens=wrong)
