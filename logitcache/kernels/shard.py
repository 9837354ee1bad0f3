"""Which rows of a vocabulary-parallel head this process holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from logitcache.errors import ObjectiveError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class VocabularyShard:
    """Rows [start, start + len(weight)) of a head of `total` rows; the ranks of `group` hold one block each, in order.

    Args:
        group: the process group that shares the head; None is the default group.
        start: the vocabulary id of this rank's first row.
        total: rows of the whole head, over all ranks.
    """

    group: ProcessGroup | None
    start: int
    total: int

    @classmethod
    def of(cls, weight_rows: int, group: ProcessGroup | None = None) -> VocabularyShard:
        """The shard of this rank, from the rows of each; blocks may differ in size, and one may be empty.

        Every rank of the group must call it. It communicates, so call it once per model rather than once per step.

        Raises:
            ObjectiveError: torch.distributed has no such process group.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise ObjectiveError(
                "a vocabulary shard needs a process group, and there is none; call "
                "torch.distributed.init_process_group first, or leave shard out"
            )
        rows: list[int] = [0] * dist.get_world_size(group)
        dist.all_gather_object(rows, int(weight_rows), group)
        return cls(group, sum(rows[: dist.get_rank(group)]), sum(rows))

    def check(self, rows: int) -> None:
        """Raise ObjectiveError if a weight of `rows` rows cannot be this shard."""
        if self.start < 0 or self.start + rows > self.total:
            raise ObjectiveError(
                f"weight has {rows} rows from id {self.start} on, but the whole head has {self.total}; build the "
                "shard with VocabularyShard.of(weight.shape[0], group)"
            )
