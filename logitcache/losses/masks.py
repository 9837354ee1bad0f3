"""Which positions keep the distillation term: of each block, those of highest entropy.

Legend: B blocks of L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from logitcache.errors import ObjectiveError, UsageError
from logitcache.losses.student import working_dtype

MEASURES = ("teacher-entropy", "student-entropy")
RESTS = ("labels", "nothing")


@dataclass(frozen=True)
class TokenMask:
    """Keeps the distillation term on a share of each block's counted positions, those of highest entropy.

    Of a block with n counted positions, round(keep * n) keep the term, halves up, and at least one; of equal entropies
    the earlier position does. So a block's mask does not depend on what else is in its batch, and how many positions
    keep the term follows from the labels alone.

    `patch_forward(mask=)` and `DistillationSettings(mask=)` take one; for `distillation_loss` itself,
    `alpha=0.9 * mask.kept(entropy_BL, counted_BL).flatten()` leaves the rest to the labels.

    Args:
        by: "teacher-entropy", of the cache (arXiv:2509.01649 drops the 15 % of lowest entropy, where what comes next
            is hardly in doubt), or "student-entropy", of the student as it is (arXiv:2604.14084 picks half of the
            tokens by it), both of the full softmax at temperature 1. The latter costs one more product with the head.
        keep: the share, in (0, 1].
        rest: what the other positions learn from: "labels", so that their loss is the cross entropy, or "nothing", as
            if they had no label: they count for no term, z-loss included, and not in the mean.

    Raises:
        UsageError: a value that makes no sense.
    """

    by: str = "teacher-entropy"
    keep: float = 0.85
    rest: str = "labels"

    def __post_init__(self) -> None:
        for name, known in (("by", MEASURES), ("rest", RESTS)):
            if getattr(self, name) not in known:
                raise UsageError(f"a mask's {name} is {getattr(self, name)!r}; use {' or '.join(known)}")
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise UsageError(f"a mask's keep is {self.keep!r}; it must be a share above 0 and at most 1, like 0.85")

    @classmethod
    def parse(cls, text: str, rest: str = "labels") -> TokenMask:
        """The mask of a text such as "teacher-entropy:0.85"; UsageError says what is wrong with it."""
        by, _, share = text.partition(":")
        try:
            keep = float(share)
        except ValueError:
            raise UsageError(
                f"the mask {text!r} is not understood; write what ranks the tokens and the share that keeps the "
                f"distillation term: {MEASURES[0]}:0.85 or {MEASURES[1]}:0.5"
            ) from None
        return cls(by, keep, rest)

    def __str__(self) -> str:
        """What `parse` reads."""
        return f"{self.by}:{self.keep}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenMask:
        """The inverse of `to_dict`; UsageError for anything it does not know."""
        known = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or set(values) - set(known):
            raise UsageError(f"a mask is a mapping of {', '.join(known)}, not {values!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A JSON value, from which `from_dict` builds an equal mask."""
        return asdict(self)

    def kept(self, entropy: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """bool [B, L]: the counted positions that keep the term. Waits for no device, and compiles.

        Args:
            entropy: [B, L] nats; read where `counted` only. NaN ranks first.
            counted: bool [B, L], where there is a label.

        Raises:
            ObjectiveError: the shapes differ or are not [B, L].
        """
        if entropy.ndim != 2 or entropy.shape != counted.shape:
            raise ObjectiveError(
                f"a mask ranks [B, L] positions, but entropy has shape {tuple(entropy.shape)} and counted "
                f"{tuple(counted.shape)}"
            )
        ranked_BL = entropy.masked_fill(~counted, -torch.inf).argsort(dim=1, descending=True, stable=True)
        place_BL = torch.arange(entropy.shape[1], device=entropy.device).expand_as(ranked_BL)
        rank_BL = torch.empty_like(ranked_BL).scatter_(1, ranked_BL, place_BL)
        share_B1 = counted.sum(dim=1, keepdim=True).to(working_dtype(entropy.device)) * self.keep
        return counted & (rank_BL < (share_B1 + 0.5).floor().clamp(min=1))

    def counted_labels(self, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
        """Labels [B, L] of which as many are not ignored as count in the loss, for trainers that count beforehand.

        Which ones do is known in the forward pass only, where there is an entropy.
        """
        if self.rest == "labels":
            return labels
        counted_BL = labels != ignore_index
        return labels.masked_fill(~self.kept(torch.zeros_like(labels, dtype=torch.float32), counted_BL), ignore_index)
