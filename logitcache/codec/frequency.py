"""Token ids <-> frequency ranks: common ids become small numbers, which compress well."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from logitcache.errors import DamagedCacheError, TargetsError

# An id seen once in the pilot is as likely as one never seen; listing it would cost more than it saves.
MIN_COUNT = 2


@dataclass(frozen=True, eq=False)
class FrequencyRanks:
    """A permutation of the vocabulary by falling frequency.

    Args:
        vocab_size: number of ids, V.
        listed: int64 [R], the R most frequent ids in falling order; all others follow in ascending order of id.
    """

    vocab_size: int
    listed: NDArray[np.int64]

    def __post_init__(self) -> None:
        bad = self.listed.size > self.vocab_size or (
            self.listed.size > 0 and (self.listed.min() < 0 or self.listed.max() >= self.vocab_size)
        )
        if bad or np.unique(self.listed).size != self.listed.size:
            raise DamagedCacheError(f"the frequency table is not a list of distinct ids below {self.vocab_size}")

    @classmethod
    def from_ids(cls, ids: ArrayLike, vocab_size: int) -> FrequencyRanks:
        """Count a pilot sample of stored ids. Ties are broken by id, so the table is a function of the sample."""
        counts = np.bincount(np.asarray(ids, dtype=np.int64), minlength=vocab_size)
        seen = np.flatnonzero(counts >= MIN_COUNT)
        return cls(vocab_size, seen[np.argsort(-counts[seen], kind="stable")])

    @cached_property
    def id_of_rank(self) -> NDArray[np.int64]:
        """int64 [V]."""
        unlisted = np.ones(self.vocab_size, dtype=bool)
        unlisted[self.listed] = False
        return np.concatenate([self.listed, np.flatnonzero(unlisted)])

    @cached_property
    def rank_of_id(self) -> NDArray[np.int64]:
        """int64 [V]."""
        ranks = np.empty(self.vocab_size, dtype=np.int64)
        ranks[self.id_of_rank] = np.arange(self.vocab_size)
        return ranks

    def encode(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ranks of ids. Raises TargetsError when an id is outside the vocabulary."""
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            worst = int(ids.max()) if ids.max() >= self.vocab_size else int(ids.min())
            raise TargetsError(f"token id {worst} is outside the vocabulary of {self.vocab_size} ids")
        return self.rank_of_id[ids]

    def decode(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids of ranks. Raises DamagedCacheError when a rank is outside the vocabulary."""
        if ranks.size and (ranks.min() < 0 or ranks.max() >= self.vocab_size):
            raise DamagedCacheError(f"a stored id rank is outside the vocabulary of {self.vocab_size} ids")
        return self.id_of_rank[ranks]
