"""Token ids <-> frequency ranks: common ids become small numbers, which compress well."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from logitcache.errors import DamagedCacheError, TargetsError

# An id seen once in the pilot is as likely as one never seen; listing it would cost more than it saves.
MIN_COUNT = 2
# Up to here a table of the whole vocabulary is faster than searching the listed ids.
DENSE_VOCABULARY = 1 << 22


@dataclass(frozen=True, eq=False)
class FrequencyRanks:
    """A permutation of the vocabulary by falling frequency.

    Args:
        vocab_size: number of ids, V, up to 2^32.
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
        seen, counts = np.unique(np.asarray(ids, dtype=np.int64), return_counts=True)
        seen, counts = seen[counts >= MIN_COUNT], counts[counts >= MIN_COUNT]
        return cls(vocab_size, seen[np.argsort(-counts, kind="stable")])

    def encode(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ranks of ids. Raises TargetsError when an id is outside the vocabulary."""
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            worst = int(ids.max()) if ids.max() >= self.vocab_size else int(ids.min())
            raise TargetsError(f"token id {worst} is outside the vocabulary of {self.vocab_size} ids")
        return self._search_rank(ids) if self._rank_of_id is None else self._rank_of_id[ids]

    def decode(self, ranks: NDArray[np.integer]) -> NDArray[np.int64]:
        """Ids of ranks. Raises DamagedCacheError when a rank is outside the vocabulary."""
        if ranks.size and (ranks.min() < 0 or ranks.max() >= self.vocab_size):
            raise DamagedCacheError(f"a stored id rank is outside the vocabulary of {self.vocab_size} ids")
        return self._search_id(ranks.astype(np.int64)) if self._id_of_rank is None else self._id_of_rank[ranks]

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(self.listed)

    @cached_property
    def _ascending(self) -> NDArray[np.int64]:
        return self.listed[self._order]

    def _search_rank(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        place = np.searchsorted(self._ascending, ids)
        ranks = self.listed.size + ids - place
        listed = np.append(self._ascending, -1)[place] == ids
        ranks[listed] = self._order[place[listed]]
        return ranks

    def _search_id(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        # The j-th unlisted id is j plus the number of listed ids before it.
        unlisted = ranks - self.listed.size
        gaps = self._ascending - np.arange(self.listed.size)
        ids = unlisted + np.searchsorted(gaps, unlisted, side="right")
        listed = unlisted < 0
        ids[listed] = self.listed[ranks[listed]]
        return ids

    @cached_property
    def _id_of_rank(self) -> NDArray[np.int64] | None:
        return self._search_id(np.arange(self.vocab_size)) if self.vocab_size <= DENSE_VOCABULARY else None

    @cached_property
    def _rank_of_id(self) -> NDArray[np.int64] | None:
        return self._search_rank(np.arange(self.vocab_size)) if self.vocab_size <= DENSE_VOCABULARY else None
