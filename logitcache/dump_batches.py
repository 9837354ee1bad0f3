"""How many blocks go through the teacher at once: as many as were asked for, or found by trial while it works."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from logitcache.dump_options import DumpOptions
from logitcache.errors import ModelError, counted
from logitcache.progress import Progress
from logitcache.teachers import Teacher

# Of a server, and on a processor: there larger batches are no faster, and a batch that is always the same gives the
# same last bits (`python -m benchmarks.dump --batches`).
USUAL_TOKENS = 4096
# A trial begins here, on a GPU; fewer tokens tell nothing but how fast kernels are launched.
LEAST_TOKENS = 1024
# Batches are doubled until the next is not faster by so much.
LEAST_GAIN = 1.05
# Batches of each size in a trial. The first is not timed: memory is allocated, kernels are chosen.
TRIES = 3
# How torch's allocator for processors says it, as a RuntimeError.
_CPU_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory")

_CPU = torch.device("cpu")

Value = TypeVar("Value")


class Batches:
    """The batch of one worker. What a trial computes is not thrown away: its batches are the dump's first ones.

    Args:
        blocks: to begin with.
        block_length: tokens in a block.
        progress: told once what was found, and once that memory ran out.
        longest: the most blocks that a batch can have; a trial doubles up to them. 0: no trial.
        device: of the teacher's head, whose work ends a batch.

    Attributes:
        blocks: in the next batch.
    """

    def __init__(
        self,
        blocks: int,
        block_length: int,
        progress: Progress,
        longest: int = 0,
        device: torch.device = _CPU,
    ) -> None:
        self.blocks, self._length, self._progress, self._longest = blocks, block_length, progress, longest
        self._device = device
        self._seconds: list[float] = []
        self._rate = 0.0
        self._said_halved = False

    @classmethod
    def of(cls, options: DumpOptions, teacher: Teacher, longest: int, progress: Progress) -> Batches:
        """As `options` say; a trial for "auto" where the teacher runs on a GPU."""
        length = options.block_length
        if options.batch_tokens != "auto":
            return cls(max(teacher.blocks_at_once, options.batch_tokens // length), length, progress)
        device = getattr(teacher, "device", _CPU)
        # Where ranks are one teacher, one that lacks memory ends them all: there is nothing to be tried.
        if device.type != "cuda" or options.tensor_parallel:
            return cls(max(teacher.blocks_at_once, USUAL_TOKENS // length), length, progress)
        return cls(max(teacher.blocks_at_once, LEAST_TOKENS // length), length, progress, longest, device)

    @property
    def tokens(self) -> int:
        """Tokens in a batch."""
        return self.blocks * self._length

    @property
    def trying(self) -> bool:
        """Whether another size may follow."""
        return self._longest > 0

    def attempt(self, work: Callable[[], Value], blocks: int, first_block: int) -> Value | None:
        """What `work` makes of so many blocks; None where memory ran out, and batches are smaller from now on.

        Raises:
            ModelError: one block is too much for the memory.
        """
        timed = self.trying and blocks == self.blocks
        began = device_clock(self._device) if timed else 0.0
        try:
            made = work()
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if blocks == 1:
                raise ModelError(
                    f"one block of {self._length} tokens (block {first_block}) is too much for the teacher's memory; "
                    "choose a shorter --block-length, --dtype bfloat16 or a device with more memory"
                ) from error
        else:
            if timed:
                self._measured(device_clock(self._device) - began)
            return made
        self._halve(blocks)
        return None

    def _halve(self, blocks: int) -> None:
        self.blocks, self._longest = blocks // 2, 0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self._said_halved:
            self._said_halved = True
            self._progress.note(
                f"{counted(blocks, 'block')} at a time are too much for the teacher's memory; going on with "
                f"{self.blocks} (--batch-tokens {self.tokens})"
            )

    def _measured(self, seconds: float) -> None:
        """A batch of a trial took so long: perhaps it is time for the next size, or for none."""
        self._seconds.append(seconds)
        if len(self._seconds) < TRIES:
            return
        rate, self._seconds = self.blocks / max(1e-9, min(self._seconds[1:])), []
        slower = rate < LEAST_GAIN * self._rate
        if not slower and 2 * self.blocks <= self._longest:
            self._rate = rate
            self.blocks *= 2
            return
        self.blocks, self._longest = self.blocks // 2 if slower else self.blocks, 0
        self._progress.note(f"{self.tokens:,} tokens at a time, as found by trial (--batch-tokens {self.tokens})")


def device_clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(said in str(error) for said in _CPU_OUT_OF_MEMORY)
