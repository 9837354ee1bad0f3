"""The tables a cache is coded with, made once from a pilot sample and stored in `codebook/`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codec.contexts import ContextTable
from logitcache.codec.frequency import FrequencyRanks
from logitcache.errors import DamagedCacheError
from logitcache.targets import SparseTargets

# Non-negative integers of any type: as they are stored when read, int64 when written.
Planes = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Codebook:
    """Frequency ranks of ids and, for the `small` layout, candidates for each token.

    Args:
        ranks: of ids; tokens are stored by them too.
        contexts: empty for the `fast` layout.
    """

    ranks: FrequencyRanks
    contexts: ContextTable

    @classmethod
    def from_pilot(
        cls, tokens: NDArray[np.int64], targets: SparseTargets, vocab_size: int, with_contexts: bool
    ) -> Codebook:
        """Count a pilot's rows, or where they hold no ids its tokens; `tokens` int64 [N] are those at their positions.

        Raises:
            TargetsError: an id or token is outside the vocabulary.
        """
        targets.check_vocabulary(vocab_size)
        ranks = FrequencyRanks.from_ids(targets.ids if targets.ids.size else tokens, vocab_size)
        ranks.encode(tokens)
        rows = targets.row_index() if with_contexts else np.zeros(0, dtype=np.int64)
        ids = targets.ids if with_contexts else rows
        return cls(ranks, ContextTable.from_pilot(ranks, tokens, rows, ids))

    def to_planes(self) -> Planes:
        """What is stored: `ids`, `context_sizes` and `candidates`."""
        return {"ids": self.ranks.listed, **self.contexts.to_planes()}

    @classmethod
    def from_planes(cls, planes: Planes, vocab_size: int) -> Codebook:
        """The inverse of `to_planes`. Raises DamagedCacheError."""
        absent = {"ids", "context_sizes", "candidates"} - set(planes)
        if absent:
            raise DamagedCacheError(f"the codebook lacks {sorted(absent)[0]!r}")
        ranks = FrequencyRanks(vocab_size, planes["ids"].astype(np.int64))
        sizes, candidates = planes["context_sizes"].astype(np.int64), planes["candidates"].astype(np.int64)
        return cls(ranks, ContextTable.from_planes(ranks, sizes, candidates))
