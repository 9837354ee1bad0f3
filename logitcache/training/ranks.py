"""Being one of several processes that train together, as torchrun starts them.

What travels here is small and lies on the CPU, so it goes over gloo, whatever carries the gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from logitcache import models
from logitcache.errors import LogitcacheError, TrainingError, UsageError

Value = TypeVar("Value")


class Ranks:
    """This process among those that train together.

    Args:
        rank: of this process, 0 for the main one, which alone writes and speaks.
        local_rank: among those on this machine.
        world_size: number of processes.
        launched: whether a launcher started this process; torchrun may well start a single one.
    """

    def __init__(self, rank: int = 0, local_rank: int = 0, world_size: int = 1, launched: bool = False) -> None:
        self.rank, self.local_rank, self.world_size, self.launched = rank, local_rank, world_size, launched
        self._group: Any = None

    @classmethod
    def of_environment(cls) -> Ranks:
        """As RANK, LOCAL_RANK and WORLD_SIZE say, which torchrun sets; alone without them. Raises UsageError."""
        given = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        # Some clusters number their machines with RANK and WORLD_SIZE; LOCAL_RANK is a launcher's.
        if given["LOCAL_RANK"] in (None, "", "-1") and given["WORLD_SIZE"] in (None, "", "1"):
            return cls()
        try:
            rank, local_rank, world_size = (int(value or "") for value in given.values())
        except ValueError as error:
            raise UsageError(
                "RANK, LOCAL_RANK and WORLD_SIZE must be set together, as torchrun does; start with `torchrun "
                "--nproc-per-node N -m logitcache.cli.main train ...`, or unset them"
            ) from error
        return cls(rank, local_rank, world_size, launched=True)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """This process' own device for "auto", "cpu" or "cuda". Raises UsageError."""
        device = models.choose_device(name)
        if device.type == "cpu" or not self.launched:
            return device
        there = torch.cuda.device_count()
        if self.local_rank >= there:
            raise UsageError(
                f"process {self.local_rank} of this machine has no GPU of its own, as there are {there}; start at most "
                f"{there} with --nproc-per-node, or use --device cpu"
            )
        return torch.device("cuda", self.local_rank)

    def join(self) -> None:
        """Meet the other processes; waits for them."""
        if not self.launched or self._group is not None:
            return
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        self._group = dist.group.WORLD if "gloo" in dist.get_backend_config() else dist.new_group(backend="gloo")

    def agree(self, check: Callable[[], Value]) -> Value:
        """What `check()` returns, once it has on every rank.

        What one rank raises ends all of them, here: a rank that went on alone would wait for ever. Where the main rank
        raises the same, `error.said_elsewhere` is set.
        """
        error: Exception | None = None
        try:
            result = check()
        except Exception as raised:
            error = raised
        if self.launched:
            error = self._first_error(error)
        if error is not None:
            raise error
        return result

    def _first_error(self, own: Exception | None) -> Exception | None:
        """This rank's own error, or else that of the first rank that has one."""
        self.join()
        mine = own and (getattr(own, "exit_code", 1), str(own) or type(own).__name__)
        everyones: list[tuple[int, str] | None] = [None] * self.world_size
        dist.all_gather_object(everyones, mine, self._group)
        first = next(((rank, said) for rank, said in enumerate(everyones) if said), None)
        if own is None and first is not None:
            rank, (exit_code, message) = first
            own = (UsageError if exit_code == 2 else TrainingError)(f"on rank {rank}: {message}")
        return own and self.common(own)

    def check_same(self, what: str, value: Any) -> None:
        """Raise TrainingError on every rank unless all have the same; it must be what pickle takes."""
        if self._group is None:
            return
        everyones: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyones, value, self._group)
        for rank, other in enumerate(everyones):
            if other != everyones[0]:
                differ = TrainingError(
                    f"rank {rank} has another {what} than rank 0 ({other!r}, not {everyones[0]!r}); let all machines "
                    "see the same files"
                )
                raise self.common(differ)

    def common(self, error: Exception) -> Exception:
        """An error that every rank raises, marked so that the main one alone says it."""
        error.said_elsewhere = not self.is_main  # type: ignore[attr-defined]
        return error

    def leave(self) -> None:
        """Part from the others, when all is done."""
        if self._group is not None:
            dist.destroy_process_group()
            self._group = None

    def wait(self) -> None:
        """Until every rank is here."""
        self.total(torch.zeros(1))

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of a tensor on the CPU."""
        if self._group is not None:
            dist.all_reduce(values, group=self._group)
        return values

    def from_main(self, value: Value) -> Value:
        """What the main rank gives; the others' values are not looked at."""
        values = [value]
        if self._group is not None:
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def share(self, items: Sequence[Value]) -> list[Value | None]:
        """This rank's items, every world_size-th; None where others have one more, so that all have as many."""
        mine: list[Value | None] = list(items[self.rank :: self.world_size])
        return mine + [None] * (-(-len(items) // self.world_size) - len(mine))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Says in one sentence that another process is gone, which torch reports in ways of its own."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or "gloo" in str(error)
            if isinstance(error, LogitcacheError) or not lost:
                raise
            gone = TrainingError(
                "another process of this run has ended, so this one cannot go on; see what that one said, and start "
                "all again with --resume"
            )
            raise self.common(gone) from error


ALONE = Ranks()
