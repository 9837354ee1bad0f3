"""How few bytes a set of stored ids could take: the entropy under models that a cache's own rows could train.

Used by `benchmarks.storage`. A row's ids are coded one by one under a model trained on the first rows, and log2(n!)
bits are given back because the order of a row's n ids carries nothing. No table is counted, which a real codec needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.store import Cache

DISCOUNT, BACK_OFF = 0.75, 20.0


@dataclass(frozen=True)
class Bounds:
    """Bytes a token for ids alone, on rows after the pilot.

    Args:
        pilot: rows that trained the models.
        unigram: coding by how frequent an id is.
        bigram: coding by how frequent it is after the current token, mixed with the unigram.
        stored: what the cache's `ids` planes take.
    """

    pilot: int
    unigram: float
    bigram: float
    stored: float


def bounds(cache: Cache, pilot: int) -> Bounds:
    """Entropy bounds of a cache's ids."""
    blocks = cache.read_blocks(0, cache.num_blocks)
    targets, tokens = blocks.targets, blocks.tokens.ravel()
    rows, lengths = targets.row_index(), targets.row_lengths
    train, test = rows < pilot, rows >= pilot
    tested = len(targets) - pilot
    unigram = _unigram(targets.ids[train], cache.vocab_size)
    p_unigram = unigram[targets.ids[test]]
    p_bigram = _bigram(tokens[rows], targets.ids, train, test, p_unigram, cache.vocab_size)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log2(np.arange(1, lengths.max() + 1)))])
    given_back = log_factorials[lengths[pilot:]].sum()
    sizes = [(-np.log2(p).sum() - given_back) / 8 / tested for p in (p_unigram, p_bigram)]
    return Bounds(pilot, sizes[0], sizes[1], cache.stored_bytes()["ids"] / cache.num_tokens)


def _unigram(ids: NDArray[np.int64], vocab_size: int) -> NDArray[np.float64]:
    """Probabilities of all ids; those never seen share as much as those seen once (Good-Turing)."""
    counts = np.bincount(ids, minlength=vocab_size).astype(np.float64)
    unseen = (counts == 1).sum() / counts.sum()
    return np.where(counts > 0, counts / counts.sum() * (1 - unseen), unseen / max(1, (counts == 0).sum()))


def _bigram(
    contexts: NDArray[np.int64],
    ids: NDArray[np.int64],
    train: NDArray[np.bool_],
    test: NDArray[np.bool_],
    p_unigram: NDArray[np.float64],
    vocab_size: int,
) -> NDArray[np.float64]:
    """Probabilities of the tested ids after their tokens: discounted counts, backed off to the unigram."""
    keys = contexts * vocab_size + ids
    pairs, counts = np.unique(keys[train], return_counts=True)
    total = np.bincount(contexts[train], minlength=vocab_size)[contexts[test]]
    kinds = np.bincount(pairs // vocab_size, minlength=vocab_size)[contexts[test]]
    place = np.searchsorted(pairs, keys[test]).clip(max=pairs.size - 1)
    count = np.where(pairs[place] == keys[test], counts[place], 0)
    left = (DISCOUNT * kinds + BACK_OFF) / (total + BACK_OFF)
    return np.maximum(count - DISCOUNT, 0) / (total + BACK_OFF) + left * p_unigram
