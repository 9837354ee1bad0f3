"""What is counted of a cache's rows, chunk by chunk.

Legend: R rows of one chunk, nnz their entries, L block length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.stats.tally import Tally
from logitcache.targets import SparseTargets

# Scalars are stored in 1/64 nat; masses are not, and counted in millionths.
NAT_STEP, MASS_STEP = 1 / 64, 1e-6
MOST_NATS, MOST_IDS = 1000.0, 65_535
Floats = NDArray[np.float64]


class ByPosition:
    """Sums over rows by their place in the block: 0, 1, 2 and 3, 4 to 7, ...; a block's beginning differs most.

    Args:
        length: L.

    Attributes:
        firsts, stops: the stretches, [first, stop).
    """

    def __init__(self, length: int) -> None:
        self.firsts = [0, *(1 << power for power in range((length - 1).bit_length()))]
        self.stops = [*self.firsts[1:], length]
        self._sums: dict[str, Floats] = {}
        self._counts: dict[str, Floats] = {}

    def add(self, name: str, places_R: NDArray[np.int64], values_R: NDArray[Any]) -> None:
        """Add a column; NaN is left out."""
        known = ~np.isnan(values_R)
        # frexp gives the number of binary digits: 0 of 0, 1 of 1, 2 of 2 and 3, ...
        part = np.frexp(places_R[known].astype(np.float64))[1]
        for kept, weights in ((self._sums, values_R[known].astype(np.float64)), (self._counts, None)):
            added = np.bincount(part, weights, minlength=len(self.firsts))
            kept[name] = kept.get(name, 0) + added.astype(np.float64)

    def mean(self, name: str) -> list[float | None]:
        """Means of a column, None where nothing is known."""
        if name not in self._counts:
            return [None] * len(self.firsts)
        pairs = zip(self._sums[name].tolist(), self._counts[name].tolist(), strict=True)
        return [total / count if count else None for total, count in pairs]


class Columns:
    """Everything counted; memory does not grow with the cache.

    Args:
        block_length: L.
        exact_head: whether rows say which of their weights are exact, so that the mass kept is known.

    Attributes:
        tokens, rows: of the blocks; of a masked cache only rows that count are looked at.
        ids, kept, entropy, surprise: ids of a row; mass of its exact weights; nats; minus log p(next token), nats.
        labelled, hits: rows with a next token, and those of them that keep it.
        id_rows, id_mass: for each id seen, rows that keep it, and the sum of its weights.
        places: means by position.
    """

    def __init__(self, block_length: int, exact_head: bool) -> None:
        self.exact_head = exact_head
        self.tokens = self.rows = self.labelled = self.hits = 0
        self.ids, self.kept = Tally(1, MOST_IDS), Tally(MASS_STEP, 1.0)
        self.entropy, self.surprise = Tally(NAT_STEP, MOST_NATS), Tally(NAT_STEP, MOST_NATS)
        self.id_rows, self.id_mass = np.zeros(0), np.zeros(0)
        self.places = ByPosition(block_length)

    def add(
        self,
        tokens_R: NDArray[np.int64],
        targets: SparseTargets,
        block_tokens: list[int],
        counted_R: NDArray[np.bool_] | None = None,
    ) -> None:
        """Count the rows of whole blocks, which hold so many tokens each; of a masked cache those that count."""
        places_R = np.concatenate([np.arange(count) for count in block_tokens])
        labels_R = np.append(tokens_R[1:], -1)
        labels_R[np.cumsum(block_tokens) - 1] = -1
        self.tokens += tokens_R.size
        if counted_R is not None:
            kept = np.flatnonzero(counted_R)
            places_R, labels_R, targets = places_R[kept], labels_R[kept], targets.take(kept)
        self.rows += labels_R.size
        surprise_R = 0 - targets.label_logprob  # not -0
        self.entropy.add(targets.entropy)
        self.surprise.add(surprise_R)
        lengths_R = targets.row_lengths.astype(np.float64)
        self.ids.add(lengths_R)
        columns: dict[str, NDArray[Any]] = {"ids": lengths_R, "entropy": targets.entropy, "cross_entropy": surprise_R}
        if self.exact_head:
            kept_R = np.minimum(targets.exact_head().row_sums(), 1)
            self.kept.add(kept_R)
            columns["kept_mass"] = kept_R
        for name, values_R in columns.items():
            self.places.add(name, places_R, values_R)
        self.labelled += int((labels_R >= 0).sum())
        self.hits += int((targets.ids == np.repeat(labels_R, targets.row_lengths)).sum())
        self._add_ids(targets)

    def _add_ids(self, targets: SparseTargets) -> None:
        size = max(self.id_rows.size, int(targets.ids.max(initial=-1)) + 1)
        for name, weights in (("id_rows", None), ("id_mass", targets.weights)):
            added = np.bincount(targets.ids, weights, minlength=size).astype(np.float64)
            before = getattr(self, name)
            added[: before.size] += before
            setattr(self, name, added)
