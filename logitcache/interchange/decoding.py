"""A sequence of a capture -> SparseTargets: bytes decoded, checked and turned into probabilities.

Legend: N positions, K = k entries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import InterchangeError, TargetsError
from logitcache.interchange.distillkit import ROUNDING, DistillKitLayout
from logitcache.interchange.sequences import SequenceRow
from logitcache.targets import SUM_TOLERANCE, SparseTargets, offsets_of

# Exact values are rounded to as little as 8 bits before they are compared with their neighbours.
ORDER_TOLERANCE = 2.0**-6


def decode_sequence(row: SequenceRow, layout: DistillKitLayout, vocab_size: int) -> tuple[SparseTargets, int]:
    """The rows of one sequence, and how many of them were scaled because they summed to more than 1.

    Raises:
        InterchangeError: an id is outside the vocabulary or repeated, or the bytes do not fit the layout.
    """
    try:
        ids = layout.decode_ids(row.ids)
        logprobs = layout.decode_logprobs(row.logprobs)
        _check_head(layout, logprobs)
        weights, scaled = probabilities(logprobs, layout.exact_k)
        targets = _to_rows(ids, weights, row.tokens)
        targets.check_vocabulary(vocab_size)
    except TargetsError as error:
        raise InterchangeError(
            f"{row.where}: {error} (if the file is whole, its --layout or --vocab-size is not the one it was made with)"
        ) from error
    return targets, scaled


def probabilities(logprobs_NK: NDArray[np.float64], exact_k: int) -> tuple[NDArray[np.float64], int]:
    """float64 [N, k] of decoded log-probabilities, and in how many rows they summed to more than 1.

    Entries are stored in falling order, but a polynomial may rise: each is held to the one before. Where the sum
    still exceeds 1 the approximated entries are scaled to what the exact ones leave, and then the row to 1.
    """
    values = np.exp(np.minimum(np.minimum.accumulate(logprobs_NK, axis=1), 0.0))
    over = values.sum(axis=1) > 1 + SUM_TOLERANCE
    head, rest = values[:, :exact_k].sum(axis=1), values[:, exact_k:].sum(axis=1)
    room = np.divide(np.maximum(1 - head, 0), rest, out=np.ones_like(rest), where=rest > 0)
    # An approximated entry keeps a little mass: a probability of 0 would say that the teacher excludes it.
    values[:, exact_k:] *= np.clip(room, 1e-6, 1)[:, None]
    values /= np.maximum(values.sum(axis=1), 1)[:, None]
    return values, int(over.sum())


def _check_head(layout: DistillKitLayout, logprobs: NDArray[np.float64]) -> None:
    """Raise TargetsError where values that are stored exactly cannot be log-probabilities in falling order."""
    exact = logprobs[:, : layout.exact_k]
    slack = ROUNDING + ORDER_TOLERANCE * np.abs(exact)
    wrong = np.isnan(logprobs).any(axis=1) | np.isposinf(logprobs).any(axis=1) | (exact > ROUNDING).any(axis=1)
    with np.errstate(invalid="ignore"):
        wrong |= (exact[:, 1:] > exact[:, :-1] + slack[:, 1:]).any(axis=1)
    if wrong.any():
        raise TargetsError(f"row {int(np.argmax(wrong))} does not decode to log-probabilities in falling order")


def _to_rows(ids: NDArray[np.int64], weights: NDArray[np.float64], tokens: NDArray[np.int64]) -> SparseTargets:
    order = np.argsort(ids, axis=1)
    ids = np.take_along_axis(ids, order, axis=1)
    kept_weights = np.take_along_axis(weights, order, axis=1).astype(np.float32)
    labels = np.append(tokens[1:], -1)
    hit = (ids == labels[:, None]) & (kept_weights > 0)
    with np.errstate(divide="ignore"):
        logs = np.log((kept_weights * hit).sum(axis=1, dtype=np.float64))
    # Entries whose probability is 0 in float32 are no entries.
    filled = kept_weights > 0
    offsets = offsets_of(filled.sum(axis=1))
    label_logprob = np.where(hit.any(axis=1), np.minimum(logs, 0), np.nan)
    return SparseTargets(offsets, ids[filled], kept_weights[filled], label_logprob=label_logprob)
