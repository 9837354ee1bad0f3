"""Ways to train one student: from a cache, with a live teacher, on cross entropy alone. What each costs.

The same student sees the same tokens and minimises (1 - ALPHA) * CE + ALPHA * KL(teacher || student), or CE alone.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.live_teacher import dense_loss, sliced_loss
from logitcache.dump import DumpOptions, Output, run_dump
from logitcache.losses import LossSettings, Objective, patch_forward
from logitcache.progress import Silent
from logitcache.reader import CacheDataset, ReaderOptions
from logitcache.selection import Selection
from logitcache.store import Cache, open_cache
from logitcache.teachers import TransformersTeacher
from logitcache.training.load import load_student

ALPHA, BLOCK_LENGTH = 0.9, 256
SAMPLED, TOP = "sample:25", "top-k:64"

# (student, teacher, batch on the student's device) -> loss
Loss = Callable[[Any, TransformersTeacher | None, Any], torch.Tensor]


@dataclass(frozen=True)
class Way:
    """One way to train the student.

    Args:
        loss: of a batch.
        objective: of the student's patched forward; None leaves the model as transformers made it.
        cache: selection of the cache whose rows are read; None: only its tokens are.
        live: whether the teacher takes part.
    """

    loss: Loss
    objective: Objective | None = None
    cache: str | None = None
    live: bool = False


def fused(student: Any, teacher: TransformersTeacher | None, batch: Any) -> torch.Tensor:
    """logitcache's loss, without logits [B, L, V]."""
    targets = batch.targets if "targets" in batch else None
    loss: torch.Tensor = student(
        input_ids=batch.input_ids, shift_labels=batch.labels, teacher_targets=targets, alpha=ALPHA
    ).loss
    return loss


def plain(student: Any, teacher: TransformersTeacher | None, batch: Any) -> torch.Tensor:
    """transformers' own loss."""
    loss: torch.Tensor = student(input_ids=batch.input_ids, labels=batch.input_ids).loss
    return loss


def _live(loss: Callable[..., torch.Tensor]) -> Loss:
    return lambda student, teacher, batch: loss(student, teacher, batch.input_ids, batch.labels, ALPHA)


CE, DENSE, SLICED = "CE only", "live teacher, dense logits", "live teacher, in slices"
CACHED = {SAMPLED: f"cached {SAMPLED}, unbiased", TOP: f"cached {TOP}, tail bucket"}
WAYS = {
    CE: Way(fused, Objective.cross_entropy()),
    "CE only, transformers' own loss": Way(plain),
    CACHED[SAMPLED]: Way(fused, Objective.forward_kl("unbiased"), SAMPLED),
    CACHED[TOP]: Way(fused, Objective.forward_kl("bucket"), TOP),
    DENSE: Way(_live(dense_loss), live=True),
    SLICED: Way(_live(sliced_loss), live=True),
}
DUMPS = {f"dump {selection}": selection for selection in (SAMPLED, TOP)}


@dataclass(frozen=True)
class Setting:
    """What all of them share.

    Args:
        teacher: its folder.
        corpus: text files.
        student: file of a transformers config.
        folder: where the caches lie.
        batch_blocks: blocks of one step.
        device: "cpu" or "cuda".
        clock: seconds by the wall's clock, or of all threads' processor time.
    """

    teacher: Path
    corpus: tuple[str, ...]
    student: Path
    folder: Path
    batch_blocks: int
    device: str
    clock: Callable[[], float] = time.perf_counter

    @property
    def batch_tokens(self) -> int:
        return self.batch_blocks * BLOCK_LENGTH

    def cache(self, selection: str) -> Cache:
        return open_cache(self.folder / selection.replace(":", "-"))

    def load_teacher(self) -> TransformersTeacher:
        return TransformersTeacher.load(self.teacher, dtype="bfloat16", device=self.device)

    def dump(self, outputs: dict[str, Path], tokens: int, teacher: TransformersTeacher | None) -> float:
        """Seconds from the teacher's first forward pass to the last commit.

        Loading and tokenising do not count: a live teacher needs them too.
        """
        options = DumpOptions(
            str(self.teacher),
            self.corpus,
            tuple(Output(Selection.parse(selection), root) for selection, root in outputs.items()),
            dtype="bfloat16",
            device=self.device,
            block_length=BLOCK_LENGTH,
            max_tokens=tokens,
            batch_tokens=max(4096, self.batch_tokens),
        )
        capture = _Capture(self.clock)
        run_dump(options, capture, teacher)
        return self.clock() - capture.began


class _Capture(Silent):
    """When a dump began to run its teacher."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self.began = clock, clock()

    def stage(self, what: str) -> None:
        if what == "running the teacher":
            self.began = self._clock()


class Training:
    """A student with its optimiser; `seconds` trains it a little further."""

    def __init__(self, way: Way, setting: Setting, teacher: TransformersTeacher | None) -> None:
        self.way, self.setting, self.teacher = way, setting, teacher
        self.cache = setting.cache(way.cache or SAMPLED)
        self.student = load_student(str(setting.student), self.cache, None, seed=0).to(setting.device).train()
        if way.objective is not None:
            patch_forward(self.student, LossSettings(way.objective))
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)

    def seconds(self, steps: int) -> float:
        """Of so many steps on the first batches of the cache's order."""
        started = self.setting.clock()
        for _ in self.losses(steps):
            pass
        if self.setting.device == "cuda":
            torch.cuda.synchronize()
        return self.setting.clock() - started

    def losses(self, steps: int) -> Iterator[torch.Tensor]:
        """The loss before each step."""
        device = self.setting.device
        options = ReaderOptions(
            self.setting.batch_blocks,
            # Whole blocks: what comes after the end of a short one would be a special case for everyone.
            stop_block=self.cache.num_tokens // BLOCK_LENGTH,
            with_targets=self.way.cache is not None,
            pin_memory=device == "cuda",
        )
        for packed in CacheDataset(self.cache, options, num_batches=steps):
            batch = packed.to(device, non_blocking=True)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = self.way.loss(self.student, self.teacher, batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield loss.detach()


def time_all(setting: Setting, teacher: TransformersTeacher, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per token of every way and every dump, by turns."""
    ways = {name: Training(way, setting, teacher if way.live else None) for name, way in WAYS.items()}
    for training in ways.values():
        training.seconds(1)
    tokens = steps * setting.batch_tokens
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, *DUMPS)}
    for _ in range(rounds):
        for name, training in ways.items():
            seconds[name].append(training.seconds(steps) / tokens)
        for name, selection in DUMPS.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds[name].append(setting.dump({selection: Path(folder) / "cache"}, tokens, teacher) / tokens)
    return seconds


def peak_of_one(name: str, setting: Setting, steps: int) -> float:
    """Peak MiB of this process, which does only this: resident memory on a CPU, allocated memory of a GPU."""
    way = WAYS.get(name)
    teacher = setting.load_teacher() if way is None or way.live else None
    training = None if way is None else Training(way, setting, teacher)
    on_cuda = setting.device == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        measure.forget_peak()
    if training is not None:
        training.seconds(steps)
    else:
        with tempfile.TemporaryDirectory() as folder:
            setting.dump({DUMPS[name]: Path(folder) / "cache"}, steps * setting.batch_tokens, teacher)
    return torch.cuda.max_memory_allocated() / 2**20 if on_cuda else measure.resident_peak()
