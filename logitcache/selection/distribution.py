"""The teacher's distributions of one slice of rows, on the device where the logits are, and what is read off them.

Legend: n rows of one slice, V vocabulary, K entries kept, G groups of `TOP_GROUP` vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.targets import offsets_of

# Columns of which the largest is taken before searching the top K.
TOP_GROUP = 64


@dataclass
class Distribution:
    """Teacher distributions of n positions.

    Args:
        logits: float32 [n, V]; -inf marks an impossible id.
        probs: float32 [n, V], softmax of the logits.
        peak: float32 [n], the largest logit.
        log_sum: float32 [n], log(sum(exp(logits - peak))), in [0, log V]. Kept apart from `peak`: beside a logit of
            100,000 their sum would lose what it says.
    """

    logits: torch.Tensor
    probs: torch.Tensor
    peak: torch.Tensor
    log_sum: torch.Tensor

    @classmethod
    def from_logits(cls, logits_nV: torch.Tensor, space_nV: torch.Tensor | None = None) -> Distribution:
        """Build from float32 logits. `lse` is not finite where a row has no softmax; the caller checks.

        `space_nV`, float32, becomes `probs`: on a CPU memory used before is nearer than new one.
        """
        probs_nV = torch.softmax(logits_nV, -1, out=space_nV)
        # The largest probability is 1 / sum(exp(z - max)): the logsumexp without another pass of exponentials.
        return cls(logits_nV, probs_nV, logits_nV.amax(-1), -probs_nV.amax(-1).log())

    @property
    def lse(self) -> torch.Tensor:
        """float32 [n], logsumexp of the logits; not finite where a row holds NaN or +inf, or -inf only."""
        return self.peak + self.log_sum

    def summary(self, labels_n: torch.Tensor, spend: bool = False) -> Summary:
        """What is known of each row beside its entries; `labels_n` are int64 [n], negative where there is none.

        `spend` where `probs` are not needed any more: their memory is used, for new memory takes longer than the sum.
        """
        return Summary(self.peak, self.log_sum, self._expected(spend), self._picked(labels_n), labels_n)

    def entropy(self) -> torch.Tensor:
        """float32 [n], nats."""
        return _entropy(self.peak, self.log_sum, self._expected(spend=False))

    def _expected(self, spend: bool) -> torch.Tensor:
        """float32 [n], sum p z of the logits z, where 0 * -inf counts as 0."""
        expected_n = torch.mul(self.probs, self.logits, out=self.probs if spend else None).sum(-1)
        if bool(expected_n.isnan().any()):
            probs_nV = torch.softmax(self.logits, -1)
            expected_n = (probs_nV * self.logits.clamp(min=torch.finfo(torch.float32).min / 4)).sum(-1)
        return expected_n

    def label_logprob(self, labels_n: torch.Tensor) -> torch.Tensor:
        """float32 [n], nats; NaN where the label is negative."""
        return _label_logprob(self.peak, self.log_sum, self._picked(labels_n), labels_n)

    def _picked(self, labels_n: torch.Tensor) -> torch.Tensor:
        return self.logits.gather(1, labels_n.clamp_min(0).unsqueeze(1)).squeeze(1)


@dataclass(frozen=True)
class Summary:
    """A few numbers of each of n rows, which are worked on for many slices at once.

    Args:
        peak, log_sum: float32 [n], those of `Distribution`.
        expected: float32 [n], sum p z of the logits z.
        picked: float32 [n], the label's logit.
        labels: int64 [n], negative where there is none.
    """

    peak: torch.Tensor
    log_sum: torch.Tensor
    expected: torch.Tensor
    picked: torch.Tensor
    labels: torch.Tensor

    @staticmethod
    def concatenate(parts: Sequence[Summary]) -> Summary:
        """Of all rows, in order."""
        return Summary(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Summary)))

    @property
    def lse(self) -> torch.Tensor:
        """As of `Distribution`."""
        return self.peak + self.log_sum

    def label_logprob(self) -> torch.Tensor:
        """float32 [n], nats; NaN where there is no label."""
        return _label_logprob(self.peak, self.log_sum, self.picked, self.labels)

    def entropy(self) -> torch.Tensor:
        """float32 [n], nats."""
        return _entropy(self.peak, self.log_sum, self.expected)


def _label_logprob(
    peak_n: torch.Tensor, log_sum_n: torch.Tensor, picked_n: torch.Tensor, labels_n: torch.Tensor
) -> torch.Tensor:
    return torch.where(labels_n >= 0, (picked_n - peak_n) - log_sum_n, torch.nan)


def _entropy(peak_n: torch.Tensor, log_sum_n: torch.Tensor, expected_n: torch.Tensor) -> torch.Tensor:
    return (log_sum_n + (peak_n - expected_n)).clamp_min(0)


def largest(logits_nV: torch.Tensor, size: int) -> torch.Tensor:
    """Ids of the `size` largest logits, falling: int64 [n, size]. Of equal logits at the border any may be kept.

    The largest K numbers lie in the K groups with the largest maxima, so only those groups are searched: twice as
    fast as `torch.topk` over a whole vocabulary.
    """
    rows, vocab = logits_nV.shape
    if size * TOP_GROUP * 2 > vocab:
        return torch.topk(logits_nV, size, dim=-1).indices
    whole = vocab - vocab % TOP_GROUP
    grouped_nGg = logits_nV[:, :whole].view(rows, -1, TOP_GROUP)
    group_nK = torch.topk(grouped_nGg.amax(-1), size, dim=-1, sorted=False).indices
    row_n1 = torch.arange(rows, device=logits_nV.device).unsqueeze(1)
    # The columns that fill no group are always searched.
    candidates_nC = torch.cat([grouped_nGg[row_n1, group_nK].flatten(1), logits_nV[:, whole:]], 1)
    place_nK = torch.topk(candidates_nC, size, dim=-1).indices
    rest_nK = place_nK - size * TOP_GROUP
    inside_nK = group_nK.gather(1, (place_nK // TOP_GROUP).clamp_max(size - 1)) * TOP_GROUP + place_nK % TOP_GROUP
    return torch.where(rest_nK < 0, inside_nK, whole + rest_nK)


def ascending(ids_nK: torch.Tensor, weights_nK: torch.Tensor) -> dict[str, torch.Tensor]:
    """Entries with ascending ids in each row, those of weight 0 last: the arrays that `entries_of` reads."""
    kept_nK = weights_nK > 0
    order_nK = torch.where(kept_nK, ids_nK, torch.iinfo(ids_nK.dtype).max).argsort(1)
    return {
        "kept": kept_nK.gather(1, order_nK),
        "ids": ids_nK.gather(1, order_nK).to(torch.int32),
        "weights": weights_nK.gather(1, order_nK),
    }


def entries_of(
    kept: NDArray[np.bool_], ids: NDArray[np.int32], weights: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """What `ascending` made, as `offsets`, `ids` and `weights` of SparseTargets."""
    return offsets_of(kept.sum(1)), ids[kept], weights[kept]
