"""What a student is trained towards: a small frozen value that goes into configurations and run records.

In the formulas q is the teacher, p the student, S the ids stored for a position; logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

import torch

from logitcache.errors import ObjectiveError
from logitcache.kernels import check_temperature
from logitcache.losses.checks import check_share

TAILS = ("bucket", "renormalised", "teacher_renormalised", "unnormalised", "label", "unbiased", "blend")
CLASS_TAILS = ("bucket", "renormalised")
# The fields that matter for each kind, with the defaults of its constructor.
_FIELDS: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "forward_kl": {"tail": "bucket"},
    "reverse_kl": {"tail": "bucket"},
    "jsd": {"tail": "bucket", "beta": 0.5},
    "skew_kl": {"tail": "bucket", "beta": 0.1, "reverse": False},
    "tvd": {"tail": "bucket"},
    "decoupled": {},
    "mse": {},
    "policy_gradient": {"clip": None},
}
KINDS = tuple(_FIELDS)


@dataclass(frozen=True)
class Objective:
    """A divergence between the teacher's sparse targets and the student. Build it with the methods below.

    Args:
        kind: one of KINDS.
        tail: what stands for the teacher's mass outside the stored ids; None for kinds that leave no choice.
        beta: the teacher's share of a mixture, of 'jsd' and 'skew_kl'.
        reverse: whether 'skew_kl' is KL(student || mixture).
        clip: largest size of the advantage of 'policy_gradient', in nats; None: any.

    Raises:
        ObjectiveError: an unknown kind or tail, an option out of range, or one that the kind does not have.
    """

    kind: str
    tail: str | None = None
    beta: float | None = None
    reverse: bool | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ObjectiveError(f"objective kind {self.kind!r} does not exist; use one of {', '.join(KINDS)}")
        fields = _FIELDS[self.kind]
        for name in ("tail", "beta", "reverse", "clip"):
            if name not in fields and getattr(self, name) is not None:
                raise ObjectiveError(f"{self.kind} has no {name}, but {name} is {getattr(self, name)!r}; leave it out")
        tails = TAILS if self.kind == "forward_kl" else CLASS_TAILS
        if "tail" in fields and self.tail not in tails:
            raise ObjectiveError(f"tail {self.tail!r} does not exist for {self.kind}; use one of {', '.join(tails)}")
        if "beta" in fields:
            self._check_beta()
        if "reverse" in fields and not isinstance(self.reverse, bool):
            raise ObjectiveError(f"reverse is {self.reverse!r}; it must be True or False")
        if self.clip is not None and not (_is_number(self.clip) and math.isfinite(self.clip) and self.clip > 0):
            raise ObjectiveError(f"clip is {self.clip!r}; it must be a finite number of nats above 0, or None for none")

    def _check_beta(self) -> None:
        """jsd vanishes at both ends; skew_kl is a KL divergence at 0 and vanishes at 1."""
        if self.kind == "jsd" and not (_is_number(self.beta) and 0 < self.beta < 1):
            raise ObjectiveError(
                f"beta is {self.beta!r}; it must be a number in (0, 1), as jsd is 0 at both ends: use forward_kl or "
                "reverse_kl, which it becomes there when divided by beta or by 1 - beta"
            )
        if self.kind == "skew_kl" and not (_is_number(self.beta) and 0 <= self.beta < 1):
            raise ObjectiveError(f"beta is {self.beta!r}; it must be a number in [0, 1), as skew_kl is 0 at 1")

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
        * 'blend': for varopt caches: (1 - blend) * bucket + blend * unbiased, from one pass over the head. `blend` is
          an argument of the loss, so that a schedule can move it.
        """
        return cls("forward_kl", tail)

    @classmethod
    def reverse_kl(cls, tail: str = "bucket") -> Objective:
        """KL(student || teacher) = sum of p log(p / q): seeks modes (MiniLLM, arXiv:2306.08543).

        The sum runs over S and one class for the rest ('bucket'), or over S with both sides renormalised on it
        ('renormalised', any temperature). Infinite where a class has p > 0 and q = 0; a teacher's probability that
        storage rounded to 0 (tail mass included) is read as 2^-24, float32's unit roundoff, here and in
        skew_kl(beta=0, reverse=True), and nowhere else.
        """
        return cls("reverse_kl", tail)

    @classmethod
    def jsd(cls, beta: float = 0.5, tail: str = "bucket") -> Objective:
        """Generalised Jensen-Shannon divergence (GKD, arXiv:2306.13649): with m = beta q + (1 - beta) p,

            beta KL(q || m) + (1 - beta) KL(p || m)

        divided by beta it tends to KL(q || p) at beta -> 0, and divided by 1 - beta to KL(p || q) at beta -> 1.
        `tail` as in `reverse_kl`; beta in (0, 1).
        """
        return cls("jsd", tail, beta=beta)

    @classmethod
    def skew_kl(cls, beta: float = 0.1, reverse: bool = False, tail: str = "bucket") -> Objective:
        """Skew KL (DistiLLM, arXiv:2402.03898, whose alpha is our beta and whose choice is 0.1):

            KL(q || beta q + (1 - beta) p), or with reverse=True KL(p || (1 - beta) q + beta p)

        The share of the first distribution in the mixture keeps every ratio below 1 / beta, so that the reverse one
        is finite where q = 0. `tail` as in `reverse_kl`; beta in [0, 1), where 0 is the plain KL divergence.
        """
        return cls("skew_kl", tail, beta=beta, reverse=reverse)

    @classmethod
    def tvd(cls, tail: str = "bucket") -> Objective:
        """Total variation distance, half the sum of |q - p|, in [0, 1] (arXiv:2307.15190); `tail` as in `reverse_kl`.

        On 'bucket' classes it is a lower bound of the distance over the whole vocabulary.
        """
        return cls("tvd", tail)

    @classmethod
    def decoupled(cls) -> Objective:
        """Decoupled, tempered top-k distillation (LFM2, arXiv:2511.23404): with m = q(S) and M = p(S) at T = 1,

            KL(Bernoulli(m) || Bernoulli(M)) + m T^2 KL(softmax_S(log q / T) || softmax_S(z / T))

        Only the second, tempered part has the factor T^2; the mass of S is compared at temperature 1, where the cache
        knows it. So any temperature has a meaning, and the tail is still learnt. At T = 1 it is forward_kl('bucket').
        The divergence that DistillationTerms reports is this value divided by T^2, as that of every other objective.
        """
        return cls("decoupled")

    @classmethod
    def mse(cls) -> Objective:
        """Mean squared error of the logits on S, in nats^2 (as in arXiv:2105.08919, with the constant removed).

        The cache holds log q, which is the teacher's logits up to a constant of the row, so both sides are centred:

            d_k = z_k - log q_k for the k in S with q_k > 0,   mse = mean over k of (d_k - mean(d))^2

        Nothing is said about ids outside S. Temperature 1 only, as a temperature would only scale it.
        """
        return cls("mse")

    @classmethod
    def policy_gradient(cls, clip: float | None = None) -> Objective:
        """Offline on-policy distillation (Lightning OPD, arXiv:2604.13010): the corpus is the student's own rollouts,

            -A log p(a),   A = clip(log q(a) - log p(a), -clip, clip) without a gradient,   a = the label

        In expectation over a ~ p this is the gradient of KL(p || q). Reads `label_logprob` and nothing else of the
        targets. The authors' released code clips no advantage, so neither does the default. The value is no distance:
        only its gradient has a meaning.
        """
        return cls("policy_gradient", clip=clip)

    @classmethod
    def default_for(cls, unbiased: bool) -> Objective:
        """The objective that suits targets: 'unbiased' for sampled ones, 'bucket' for top-k and top-p."""
        return cls.forward_kl("unbiased" if unbiased else "bucket")

    @classmethod
    def named(cls, kind: str, **options: Any) -> Objective:
        """The objective of a kind, with the options given and defaults for the others: for command lines."""
        known = [field.name for field in fields(cls) if field.name != "kind"]
        for name in options:
            if name not in known:
                raise ObjectiveError(f"objectives have no option {name!r}; they have {', '.join(known)}")
        return cls(kind, **{**_FIELDS.get(kind, {}), **options})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Objective:
        """The inverse of `to_dict`; ObjectiveError for anything it does not know."""
        if not isinstance(values, Mapping):
            raise ObjectiveError(f"an objective is a mapping with 'kind' and its options, not {values!r}")
        if "kind" not in values:
            raise ObjectiveError(f"objective has no 'kind'; use one of {', '.join(KINDS)}")
        kind = values["kind"]
        if kind not in KINDS:
            return cls(kind)
        known = ("kind", *_FIELDS[kind])
        unknown = sorted(str(key) for key in set(values) - set(known))
        if unknown:
            raise ObjectiveError(f"objective has unknown keys {', '.join(unknown)}; {kind} has {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A JSON value, of the fields that matter for the kind, from which `from_dict` builds an equal objective."""
        return {"kind": self.kind} | {name: getattr(self, name) for name in _FIELDS[self.kind]}

    @property
    def reads_targets(self) -> bool:
        """Whether anything of the teacher is read."""
        return self.kind != "cross_entropy"

    @property
    def reads_labels(self) -> bool:
        """Whether the divergence depends on which token the label is."""
        return self.kind in ("cross_entropy", "policy_gradient") or self.tail == "label"

    @property
    def reads_exact_head(self) -> bool:
        """Whether, of unbiased targets, the exact entries stand for all: a short top-k."""
        return self.tail == "bucket" or self.kind in ("decoupled", "mse")

    @property
    def _name(self) -> str:
        if self.kind == "forward_kl":
            return f"tail={self.tail!r}"
        return self.kind if self.tail is None else f"{self.kind} with tail={self.tail!r}"

    def check(
        self,
        unbiased: bool,
        temperature: float = 1.0,
        alpha: float | torch.Tensor = 1.0,
        has_exact_head: bool = False,
        has_label_logprob: bool = True,
        has_ids: bool = True,
    ) -> None:
        """Refuse combinations without a correct meaning.

        Args:
            unbiased: whether the targets' weights are unbiased estimates (sampled) or probabilities.
            temperature: T of the divergence.
            alpha: weight of the divergence. A Python 0 means that the targets are not read, so that nothing about them
                can be wrong.
            has_exact_head: whether unbiased targets say which of their weights are exact (varopt:K does).
            has_label_logprob: whether the targets hold the teacher's log-probability of the labels.
            has_ids: whether the targets' rows have entries; those of a `label` cache have none.

        Raises:
            ObjectiveError: says what to use or to store instead.
        """
        check_share("alpha", alpha)
        check_temperature(temperature)
        if not self.reads_targets or (isinstance(alpha, int | float) and alpha == 0):
            return
        if self.kind == "policy_gradient":
            if not has_label_logprob:
                raise ObjectiveError(
                    "policy_gradient needs the teacher's log-probability of every label, which these targets do not "
                    "hold; use a cache that `dump` wrote and whose label_logprob was not dropped"
                )
        elif not has_ids:
            raise ObjectiveError(
                f"{self._name} needs the teacher's probabilities of ids, but these targets hold none (--select label "
                "keeps the labels' log-probabilities only); use policy_gradient (train --objective policy-gradient), "
                "or dump with another --select"
            )
        elif unbiased:
            self._check_samples(has_exact_head)
        elif self.tail in ("unbiased", "blend"):
            spec = "sample:N or varopt:K" if self.tail == "unbiased" else "varopt:K"
            raise ObjectiveError(
                f"{self._name} needs sampled targets, but these hold probabilities of top-k or top-p; use "
                f"tail='bucket', or dump a cache with --select {spec}"
            )
        self._check_temperature(unbiased, temperature)

    def _check_samples(self, has_exact_head: bool) -> None:
        """Raise ObjectiveError unless unbiased targets can be used: as they are, or the exact head of them."""
        needs_head = self.reads_exact_head or self.tail == "blend"
        if self.tail == "unbiased" or (needs_head and has_exact_head):
            return
        sampled = "tail='unbiased'" if self.kind == "forward_kl" else "forward_kl with tail='unbiased'"
        if needs_head:
            also = {"bucket": " (it serves both), top-k:K or top-p:P:K", "blend": ""}
            raise ObjectiveError(
                f"{self._name} needs exact probabilities, but none of these samples is exact; use {sampled}, or dump "
                f"a cache with --select varopt:K{also.get(str(self.tail), ', top-k:K or top-p:P:K')}"
            )
        if has_exact_head:
            sampled = "tail='unbiased' or 'bucket'" if self.kind == "forward_kl" else "tail='bucket'"
        raise ObjectiveError(
            f"{self._name} needs probabilities, but these targets are unbiased samples; use {sampled}, "
            "or dump a cache with --select top-k:K or top-p:P:K"
        )

    def _check_temperature(self, unbiased: bool, temperature: float) -> None:
        """Raise ObjectiveError unless the divergence can be had at this temperature from what is stored."""
        if temperature == 1 or self.tail == "renormalised" or self.kind == "decoupled":
            return
        if self.kind in ("mse", "policy_gradient"):
            raise ObjectiveError(f"temperature is {temperature}, but {self.kind} has none; use temperature=1")
        if unbiased:
            raise ObjectiveError(
                f"temperature is {temperature}, but sampled weights are unbiased at temperature 1 only; use "
                "temperature=1, or tail='renormalised' with a cache dumped with --select top-k:K"
            )
        raise ObjectiveError(
            f"temperature is {temperature}, but {self._name} needs the teacher's tail mass at that temperature, and "
            "the cache stores it at temperature 1; use tail='renormalised', or temperature=1"
        )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
