"""Ids <-> keys that are small where the id is likely after the current token.

After each token some ids are stored again and again, so a pilot's rows give every token a list of candidates. An id's
key is 0 if it is the text's own next token (which the teacher usually expects, and which is stored anyway), 1 + its
place among the candidates of the current token if it is one, and otherwise 1 + the length of that list + its
frequency rank. Decoding is one gather.

Legend: N rows, nnz entries, K keys of a row, V vocabulary, P candidates of all tokens together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codec.frequency import DENSE_VOCABULARY, FrequencyRanks
from logitcache.codec.memory import FRESH, Memory
from logitcache.codec.pairs import PairIndex
from logitcache.errors import DamagedCacheError
from logitcache.targets import offsets_of

# A pair seen once in the pilot is too uncertain to pay for its place in the table.
MIN_COUNT = 2
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ContextTable:
    """Candidate ids for each current token, the most frequent first.

    Args:
        ranks: the frequency ranks that all other ids are coded by.
        tokens: int64 [C], the tokens that have candidates, ascending.
        starts: int64 [C + 1], where each token's candidates begin.
        candidates: int64 [P], ids.
    """

    ranks: FrequencyRanks
    tokens: Ints
    starts: Ints
    candidates: Ints

    @classmethod
    def from_pilot(cls, ranks: FrequencyRanks, tokens_N: Ints, rows: Ints, ids: Ints) -> ContextTable:
        """Count (current token, id) pairs of a pilot.

        Args:
            ranks: frequency ranks; ties are broken by them.
            tokens_N: the token at each row's position.
            rows: int64 [nnz], the row of each entry.
            ids: int64 [nnz].
        """
        keys, counts = np.unique(_pair(tokens_N[rows], ids), return_counts=True)
        keys, counts = keys[counts >= MIN_COUNT], counts[counts >= MIN_COUNT]
        context, candidate = (keys >> np.uint64(32)).astype(np.int64), (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        order = np.lexsort((ranks.encode(candidate), -counts, context))
        tokens, starts = np.unique(context, return_index=True)
        return cls(ranks, tokens, np.append(starts, keys.size), candidate[order])

    def to_planes(self) -> dict[str, Ints]:
        """Two planes: `context_sizes` [by frequency rank of the token] and `candidates` (ranks), in the same order."""
        rank = self.ranks.encode(self.tokens)
        order = np.argsort(rank)
        sizes = np.zeros(int(rank.max(initial=-1)) + 1, dtype=np.int64)
        sizes[rank] = np.diff(self.starts)
        moved = _ranges(self.starts[:-1][order], np.diff(self.starts)[order])
        return {"context_sizes": sizes, "candidates": self.ranks.encode(self.candidates)[moved]}

    @classmethod
    def from_planes(cls, ranks: FrequencyRanks, sizes: Ints, candidates: Ints) -> ContextTable:
        """The inverse of `to_planes`. Raises DamagedCacheError."""
        present = np.flatnonzero(sizes)
        if sizes.size > ranks.vocab_size or sizes.max(initial=0) > candidates.size or sizes.sum() != candidates.size:
            raise DamagedCacheError("the context table's sizes do not fit its candidates")
        tokens, lengths = ranks.decode(present), sizes[present]
        starts = np.cumsum(lengths) - lengths
        order = np.argsort(tokens)
        ids = ranks.decode(candidates)[_ranges(starts[order], lengths[order])]
        return cls(ranks, tokens[order], offsets_of(lengths[order]), ids)

    def encode(self, tokens_N: Ints, following_N: Ints, rows: Ints, ids: Ints) -> Ints:
        """Keys of ids: int64 [nnz], for the entries of N rows.

        Args:
            tokens_N: int64 [N], the current token of each row.
            following_N: int64 [N], the token after it; -1 where there is none.
            rows: int64 [nnz], the row of each entry.
            ids: int64 [nnz].
        """
        first_N, size_N = self._span(tokens_N)
        keys = self._pairs.find(_pair(tokens_N[rows], ids))
        elsewhere = np.flatnonzero(keys < 0)
        keys -= first_N[rows]
        keys[elsewhere] = size_N[rows[elsewhere]] + self.ranks.encode(ids[elsewhere])
        keys += 1
        keys[ids == following_N[rows]] = 0
        return keys

    def decode(
        self, tokens_N: Ints, following_N: Ints, keys_KN: NDArray[Any], memory: Memory = FRESH
    ) -> NDArray[np.int64]:
        """Ids of keys: the inverse of `encode`.

        Args:
            tokens_N: int64 [N], the current token of each row.
            following_N: int64 [N], the token after it; -1 where there is none.
            keys_KN: integers [K, N], some keys of each row; none over the vocabulary's size and all candidates.
            memory: where the ids come to lie, as scratch.

        Raises:
            DamagedCacheError: a key stands for nothing.
        """
        first_N, size_N = self._span(tokens_N)
        unlisted_KN = keys_KN > size_N
        # Candidates begin after key 0, ranks after the candidates. Key 0 looks up anything here and is replaced below.
        lookup_KN = memory.scratch("lookup", keys_KN.size, np.intp).reshape(keys_KN.shape)
        np.add(keys_KN, np.where(unlisted_KN, self.candidates.size - 1 - size_N, first_N - 1), out=lookup_KN)
        ids_KN = memory.scratch("unsorted", keys_KN.size, np.int64).reshape(keys_KN.shape)
        if self._table is not None:
            if int(lookup_KN.max(initial=-1)) >= self._table.size:
                raise DamagedCacheError(f"a stored id rank is outside the vocabulary of {self.ranks.vocab_size} ids")
            np.take(self._table, lookup_KN, out=ids_KN, mode="clip")
        else:
            np.take(np.append(self.candidates, 0), lookup_KN, out=ids_KN, mode="clip")
            ids_KN[unlisted_KN] = self.ranks.decode(lookup_KN[unlisted_KN] - self.candidates.size)
        np.copyto(ids_KN, following_N, where=keys_KN == 0)
        if ids_KN.min(initial=0) < 0:
            raise DamagedCacheError("an entry stands for the next token where there is none")
        return ids_KN

    def _span(self, tokens: Ints) -> tuple[Ints, Ints]:
        """Where each token's candidates begin, and how many they are."""
        if self._dense is not None:
            return self._dense[0][tokens], self._dense[1][tokens]
        place = np.searchsorted(self.tokens, tokens)
        there = np.append(self.tokens, -1)[place] == tokens
        sizes = np.append(np.diff(self.starts), 0)
        return np.where(there, self.starts[place], 0), np.where(there, sizes[place], 0)

    @cached_property
    def _dense(self) -> tuple[Ints, Ints] | None:
        if self.ranks.vocab_size > DENSE_VOCABULARY:
            return None
        first, size = np.zeros((2, self.ranks.vocab_size), dtype=np.int64)
        first[self.tokens], size[self.tokens] = self.starts[:-1], np.diff(self.starts)
        return first, size

    @cached_property
    def _table(self) -> Ints | None:
        """All candidates, and after them the ids by rank."""
        if self.ranks.vocab_size > DENSE_VOCABULARY:
            return None
        return np.append(self.candidates, self.ranks.decode(np.arange(self.ranks.vocab_size)))

    @cached_property
    def _pairs(self) -> PairIndex:
        """All (token, id) pairs, in the order of the candidates."""
        return PairIndex(_pair(np.repeat(self.tokens, np.diff(self.starts)), self.candidates))


def _pair(tokens: Ints, ids: Ints) -> NDArray[np.uint64]:
    return tokens.astype(np.uint64) << np.uint64(32) | ids.astype(np.uint64)


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """arange(start, start + length) of each pair, one after another."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if ends.size else 0) + np.repeat(starts - (ends - lengths), lengths)
