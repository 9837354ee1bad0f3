"""What a server says of the tokens of a prompt, checked.

Legend: P tokens of a prompt, R = P - 1 of them with a distribution before them, K entries of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.targets import SUM_TOLERANCE

# JSON has no infinity: servers write this or less for log 0.
LOG_ZERO = -9999.0


class AnswerError(Exception):
    """An answer that cannot be used: half a sentence, what the server does; and where it is seen."""

    def __init__(self, what: str, position: int | None = None, prompt: int = 0) -> None:
        super().__init__(what)
        self.position, self.prompt = position, prompt


class VocabularyError(AnswerError):
    """The server's model has more ids than the tokenizer, or the config beside it, says."""


@dataclass(frozen=True)
class PromptLogprobs:
    """The K most probable ids after each of the first R tokens of a prompt.

    Args:
        ids: int64 [R, K], distinct in a row.
        logprobs: float64 [R, K], nats, falling in each row.
        sent: float64 [R], log p of the token that stands next in the prompt, nats; NaN in a row that is unknown.
        spare: whether a row came with more than K entries, the token that was sent being one more.
        text: the server's own reading of the prompt's tokens behind the first, if it tells.
    """

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    sent: NDArray[np.float64]
    spare: bool
    text: str | None = None

    @classmethod
    def of(
        cls, rows: Sequence[Mapping[int, float]], prompt: Sequence[int], entries: int, vocab_size: int
    ) -> PromptLogprobs:
        """Build from id -> log p at each position behind the first, which may hold more than K entries.

        Args:
            rows: R mappings.
            prompt: P ids that were sent.
            entries: K that was asked for.
            vocab_size: every id must be below it.

        A row with a number that is null or NaN is unknown: all of it becomes NaN.

        Raises:
            AnswerError: a position, the token that was sent or an entry is missing, or they are no log-probabilities.
            VocabularyError: an id is too large.
        """
        if len(rows) != len(prompt) - 1:
            raise AnswerError(f"tells of {len(rows)} positions of {len(prompt) - 1}")
        for position, (row, token) in enumerate(zip(rows, prompt[1:], strict=True)):
            if token not in row:
                raise AnswerError(f"does not know id {token}, the token that was sent", position)
            if len(row) < entries:
                raise AnswerError(f"tells {len(row)} of {entries} entries", position)
        lengths = np.array([len(row) for row in rows])
        filled = np.arange(lengths.max()) < lengths[:, None]
        ids, logprobs = np.zeros(filled.shape, dtype=np.int64), np.full(filled.shape, -np.inf)
        ids[filled] = [number for row in rows for number in row]
        logprobs[filled] = [value for row in rows for value in row.values()]
        sent = np.array([row[token] for row, token in zip(rows, prompt[1:], strict=True)], dtype=np.float64)
        unknown = np.isnan(logprobs).any(1)
        logprobs[unknown] = sent[unknown] = np.nan
        _check(ids, logprobs, vocab_size)
        order = np.argsort(-logprobs, axis=1, kind="stable")[:, :entries]
        falling = np.take_along_axis(logprobs, order, 1)
        spare = bool(lengths.max() > entries)
        return cls(np.take_along_axis(ids, order, 1), _with_infinities(falling), _with_infinities(sent), spare)

    @property
    def unknown(self) -> NDArray[np.bool_]:
        """bool [R]: rows of which the server says null or NaN."""
        return np.isnan(self.sent)

    def check_known(self) -> None:
        """Raise AnswerError if a row is unknown."""
        if self.unknown.any():
            raise AnswerError("says NaN, so its model's numbers have overflown", int(np.argmax(self.unknown)))

    @property
    def counts_the_sent(self) -> bool:
        """Whether the rows look like K - 1 most probable ids and the token that was sent, which is not exact."""
        return not self.spare and int((self.sent == self.logprobs[:, -1]).sum()) > 1


def _with_infinities(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(logprobs <= LOG_ZERO, -np.inf, logprobs)


def _check(ids_RK: NDArray[np.int64], logprobs_RK: NDArray[np.float64], vocab_size: int) -> None:
    strange_R = ((ids_RK < 0) | (ids_RK >= vocab_size)).any(1)
    if strange_R.any():
        raise VocabularyError(f"names an id outside a vocabulary of {vocab_size}", int(np.argmax(strange_R)))
    with np.errstate(over="ignore"):
        mass_R = np.exp(logprobs_RK).sum(1)
    for bad_R, what in (
        ((logprobs_RK > SUM_TOLERANCE).any(1), "says numbers above 0, which are logits or no log-probabilities"),
        (mass_R > 1 + SUM_TOLERANCE, "gives the most probable ids more than all of the probability"),
    ):
        if bad_R.any():
            raise AnswerError(what, int(np.argmax(bad_R)))
