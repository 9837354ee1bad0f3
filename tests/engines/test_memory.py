"""A teacher that is out of memory: smaller batches, said once, and the rows that other batches give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.dump import run_dump
from logitcache.errors import ModelError
from logitcache.progress import Silent
from logitcache.store import verify
from logitcache.teachers import TransformersTeacher
from tests.engines.dumps import content, options


def on_the_processor() -> None:
    """More than any machine has, asked of torch's own allocator."""
    torch.empty(1 << 60, dtype=torch.uint8)


def on_a_gpu() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def in_python() -> None:
    raise MemoryError


class Notes(Silent):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, what: str) -> None:
        self.said.append(what)


@pytest.fixture(scope="module")
def teacher(place: Path) -> TransformersTeacher:
    return TransformersTeacher.load(place / "teacher", device="cpu")


@contextmanager
def room_for(teacher: TransformersTeacher, blocks: int, fail: Callable[[], None]) -> Iterator[list[int]]:
    """Batches of more than `blocks` blocks fail. Yields the sizes of those that were tried."""
    tried: list[int] = []

    def check(_module: Any, _inputs: Any, output: Any) -> None:
        tried.append(len(output.last_hidden_state))
        if tried[-1] > blocks:
            fail()

    hook = teacher.model.base_model.register_forward_hook(check)
    yield tried
    hook.remove()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("fail", [on_the_processor, on_a_gpu, in_python])
def test_batches_are_halved(
    place: Path, teacher: TransformersTeacher, tmp_path: Path, fail: Callable[[], None]
) -> None:
    small = options(place, tmp_path / "small", batch_tokens=16)
    run_dump(small, teacher=teacher)
    notes = Notes()
    with room_for(teacher, 1, fail) as tried:
        run_dump(options(place, tmp_path / "cache", batch_tokens=5 * 16), notes, teacher)
    assert tried[:4] == [5, 2, 1, 1]
    assert set(tried[4:]) == {1}
    assert notes.said == [
        "5 blocks at a time are too much for the teacher's memory; going on with 2 (--batch-tokens 32)"
    ]
    assert verify(tmp_path / "cache").ok
    assert content(tmp_path / "cache") == content(tmp_path / "small")


def test_one_block_that_is_too_much(place: Path, teacher: TransformersTeacher, tmp_path: Path) -> None:
    with (
        room_for(teacher, 0, on_the_processor),
        pytest.raises(ModelError, match=r"^one block of 16 tokens \(block 0\) is too much for the teacher's memory; "),
    ):
        run_dump(options(place, tmp_path / "cache"), teacher=teacher)
    run_dump(options(place, tmp_path / "cache"), teacher=teacher)
    assert verify(tmp_path / "cache").ok


def test_other_failures_are_not_taken_for_it(place: Path, teacher: TransformersTeacher, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with room_for(teacher, 0, fail) as tried, pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_dump(options(place, tmp_path / "cache"), teacher=teacher)
    assert tried == [3]
