"""What a student is trained towards: a small frozen value that goes into configurations and run records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from logitcache.errors import ObjectiveError

KINDS = ("cross_entropy", "forward_kl")
TAILS = ("bucket", "renormalised", "teacher_renormalised", "unnormalised", "label", "unbiased")


@dataclass(frozen=True)
class Objective:
    """A divergence between the teacher's sparse targets and the student. Build it with the methods below.

    Args:
        kind: 'cross_entropy' (labels only) or 'forward_kl'.
        tail: what stands for the teacher's mass outside the stored ids; None for 'cross_entropy'.

    Raises:
        ObjectiveError: an unknown kind or tail, or a tail where there is none.
    """

    kind: str
    tail: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ObjectiveError(f"objective kind {self.kind!r} does not exist; use one of {', '.join(KINDS)}")
        if self.kind == "cross_entropy":
            if self.tail is not None:
                raise ObjectiveError(f"cross_entropy has no tail, but tail is {self.tail!r}; leave it out")
        elif self.tail not in TAILS:
            raise ObjectiveError(f"tail {self.tail!r} does not exist; use one of {', '.join(TAILS)}")

    @classmethod
    def cross_entropy(cls) -> Objective:
        """Cross entropy on the labels; targets are not read."""
        return cls("cross_entropy")

    @classmethod
    def forward_kl(cls, tail: str = "bucket") -> Objective:
        """KL(teacher || student). `tail` decides what happens to the teacher's mass outside the stored ids S:

        * 'bucket': one more class holds it, on both sides (K + 1 classes). Default for top-k and top-p caches. Of a
          varopt cache, S is the head: the entries whose weight is above the row's threshold, which are exact.
        * 'renormalised': both sides are renormalised on S. Any temperature. The student's mass outside S is free.
        * 'unnormalised': the sum over S alone. Biased: its optimum is p = q / sum(q) on S and nothing outside, which
          makes the student overconfident. Offered because published work uses it.
        * 'teacher_renormalised': the teacher is renormalised on S, the student is not: what most tools do with top-k.
          The same optimum as 'unnormalised', so as biased; offered to compare with.
        * 'label': the mass goes to the label, in S or not.
        * 'unbiased': for sampled caches (sample:N, varopt:K); the gradient equals the full KL's in expectation.
        """
        return cls("forward_kl", tail)

    @classmethod
    def default_for(cls, unbiased: bool) -> Objective:
        """The objective that suits targets: 'unbiased' for sampled ones, 'bucket' for top-k and top-p."""
        return cls.forward_kl("unbiased" if unbiased else "bucket")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Objective:
        """The inverse of `to_dict`; ObjectiveError for anything it does not know."""
        if not isinstance(values, Mapping):
            raise ObjectiveError(f"an objective is a mapping with 'kind' and 'tail', not {values!r}")
        unknown = sorted(str(key) for key in set(values) - {"kind", "tail"})
        if unknown:
            raise ObjectiveError(f"objective has unknown keys {', '.join(unknown)}; it has kind and tail")
        if "kind" not in values:
            raise ObjectiveError(f"objective has no 'kind'; use one of {', '.join(KINDS)}")
        return cls(values["kind"], values.get("tail"))

    def to_dict(self) -> dict[str, str]:
        """A JSON value from which `from_dict` builds an equal objective."""
        return {"kind": self.kind} if self.tail is None else {"kind": self.kind, "tail": self.tail}

    def check(
        self,
        unbiased: bool,
        temperature: float = 1.0,
        alpha: float | torch.Tensor = 1.0,
        has_exact_head: bool = False,
    ) -> None:
        """Refuse combinations without a correct meaning.

        Args:
            unbiased: whether the targets' weights are unbiased estimates (sampled) or probabilities.
            temperature: T of the divergence.
            alpha: weight of the divergence. A float is checked; 0 means that the targets are not read, so that nothing
                about them can be wrong. Of a tensor the values are not looked at.
            has_exact_head: whether unbiased targets say which of their weights are exact (varopt:K does).

        Raises:
            ObjectiveError: says what to use or to store instead.
        """
        check_alpha(alpha)
        if not (math.isfinite(temperature) and temperature > 0):
            raise ObjectiveError(f"temperature is {temperature}; it must be a finite number above 0")
        if self.kind == "cross_entropy" or (isinstance(alpha, int | float) and alpha == 0):
            return
        if self.tail == "unbiased" and not unbiased:
            raise ObjectiveError(
                "tail='unbiased' needs sampled targets, but these hold probabilities of top-k or top-p; use "
                "tail='bucket', or dump a cache with --select sample:N or varopt:K"
            )
        if unbiased and self.tail != "unbiased":
            self._check_head(has_exact_head)
        if temperature == 1 or self.tail == "renormalised":
            return
        if unbiased:
            raise ObjectiveError(
                f"temperature is {temperature}, but sampled weights are unbiased at temperature 1 only; use "
                "temperature=1, or tail='renormalised' with a cache dumped with --select top-k:K"
            )
        raise ObjectiveError(
            f"temperature is {temperature}, but tail={self.tail!r} needs the teacher's tail mass at that temperature, "
            "and the cache stores it at temperature 1; use tail='renormalised', or temperature=1"
        )

    def _check_head(self, has_exact_head: bool) -> None:
        """Raise ObjectiveError unless this tail can use unbiased targets: 'bucket' can where their head is exact."""
        if self.tail == "bucket" and has_exact_head:
            return
        if self.tail == "bucket":
            raise ObjectiveError(
                "tail='bucket' needs exact probabilities, but none of these samples is exact; use tail='unbiased', or "
                "dump a cache with --select varopt:K (it serves both), top-k:K or top-p:P:K"
            )
        usable = "tail='unbiased' or 'bucket'" if has_exact_head else "tail='unbiased'"
        raise ObjectiveError(
            f"tail={self.tail!r} needs probabilities, but these targets are unbiased samples; use {usable}, "
            "or dump a cache with --select top-k:K or top-p:P:K"
        )


def check_alpha(alpha: float | torch.Tensor) -> None:
    """Raise ObjectiveError unless alpha is a number in [0, 1] or a tensor (whose values are not looked at)."""
    if isinstance(alpha, torch.Tensor):
        return
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ObjectiveError(
            f"alpha is {alpha!r}; it must be a number in [0, 1] or a tensor of such numbers, one per row"
        )
