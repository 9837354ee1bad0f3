"""Tokens and rows for golden caches: whole numbers from a fixed stream, so that every machine makes the same.

What a row is made of depends on its number, so that every form of row occurs: empty ones, ones without a tail, ones
that are all tail, columns that are unknown or -inf.

Legend: N rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from logitcache.targets import SparseTargets

VOCABULARY = 120
# Few tokens, so that contexts repeat.
TOKENS = 9
DRAWS = 6
LONGEST = 5
HEADS_AND_TAILS = 16
Row = tuple[list[int], list[float], float, float]  # ids, weights, tail mass, threshold


class Stream:
    """Whole numbers; the generator's bits are the same in every version of numpy."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed)

    def below(self, limit: int, count: int) -> list[int]:
        return (self._bits.random_raw(count) % np.uint64(limit)).tolist()  # type: ignore[no-any-return]

    def ids(self, token: int, count: int) -> list[int]:
        """At most `count` ids, some of them typical of the token."""
        return sorted({(token * 13 + step) % VOCABULARY for step in self.below(11, count)})


def tokens_of(count: int, seed: int) -> NDArray[np.int64]:
    """int64 [N]."""
    return np.array(Stream(1000 + seed).below(TOKENS, count), dtype=np.int64) * 11


def mask_of(blocks: list[int], seed: int) -> NDArray[np.bool_]:
    """bool [N]: runs that count and others; no block's last position does, and of one block none."""
    counted = []
    for block, tokens in enumerate(blocks):
        draws = Stream(3000 + 100 * seed + block).below(3, tokens)
        counted += [block != 3 and place < tokens - 1 and draws[place // 2] > 0 for place in range(tokens)]
    return np.array(counted, dtype=bool)


def rows_of(coding: str, tokens: NDArray[np.int64], seed: int) -> SparseTargets:
    """A row for each token, of a value coding's kind."""
    stream = Stream(2000 + seed)
    make: Callable[[Stream, int, int], Row] = MAKERS[coding]
    rows = [make(stream, number, int(token)) for number, token in enumerate(tokens)]
    offsets = np.cumsum([0, *(len(ids) for ids, *_ in rows)])
    return SparseTargets(
        offsets,
        np.array([one for ids, *_ in rows for one in ids], dtype=np.int64),
        np.array([weight for _, weights, *_ in rows for weight in weights], dtype=np.float32),
        tail_mass=[tail for _, _, tail, _ in rows],
        threshold=[threshold for *_, threshold in rows],
        unbiased=coding not in ("probabilities", "none"),
        label_logprob=_columns(stream, len(rows), {3: np.nan, 5: -np.inf, 8: 0.0}, -1),
        entropy=_columns(stream, len(rows), {4: np.nan, 5: 0.0}, 1),
    )


def _columns(stream: Stream, count: int, special: dict[int, float], sign: int) -> list[float]:
    steps = stream.below(1000, count)
    return [special.get(number % 13, sign * step / 100) for number, step in enumerate(steps)]


def _counts(stream: Stream, number: int, token: int) -> Row:
    drawn = [(token * 13 + step) % VOCABULARY for step in stream.below((1, 3, 11)[number % 3], DRAWS)]
    ids = sorted(set(drawn))
    return ids, [drawn.count(one) / DRAWS for one in ids], 0, np.inf


def _probabilities(stream: Stream, number: int, token: int) -> Row:
    if number % 11 == 4:
        return [], [], 1, 0
    ids = stream.ids(token, LONGEST)
    if number % 11 == 6:
        return ids, [2.0**-90] * len(ids), 1, 0
    parts = [1 + part for part in stream.below((3, 1 << 20)[number % 2], len(ids))]
    tail = 0 if number % 11 == 7 else 1 + stream.below(1000, 1)[0]
    total = sum(parts) + tail
    return ids, [part / total for part in parts], tail / total, 0


def _none(stream: Stream, number: int, token: int) -> Row:
    return [], [], 1, 0


def _weights(stream: Stream, number: int, token: int) -> Row:
    ids = [] if number % 11 == 4 else stream.ids(token, LONGEST)
    parts = [1 + part for part in stream.below(2000, len(ids))]
    return (
        ids,
        [part / 1000 / 4**shift for part, shift in zip(parts, stream.below(12, len(ids)), strict=True)],
        0,
        np.inf,
    )


def _head_tail(stream: Stream, number: int, token: int) -> Row:
    if number % 11 == 4:
        return [], [], 0, 0
    ids = sorted({(token * 13 + step) % VOCABULARY for step in range(HEADS_AND_TAILS)})
    heads = (0, 1, 4, HEADS_AND_TAILS)[number % 4]
    tails = len(ids) - heads
    # All equal in a row without head, otherwise less than any head; equal heads need a finer grid.
    threshold = 0.0 if not tails else 1 / tails if not heads else (1 + stream.below(40, 1)[0]) / 1024
    shares = [1 + share for share in stream.below((1, 500)[number % 3 > 0], heads)]
    spare = 1 - len(ids) * threshold
    weights = [threshold + spare * share / sum(shares) for share in shares] + [threshold] * tails
    turn = number % len(ids)
    return ids, weights[turn:] + weights[:turn], 0, threshold


MAKERS: dict[str, Callable[[Stream, int, int], Row]] = {
    "none": _none,
    "counts": _counts,
    "probabilities": _probabilities,
    "weights": _weights,
    "head-tail": _head_tail,
}
