"""What a student is trained towards: a small frozen value that goes into configurations and run records.

In the formulas q is the teacher, p the student, S the ids stored for a position; logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch

from logitcache.errors import ObjectiveError
from logitcache.kernels import check_temperature
from logitcache.losses.checks import check_share
from logitcache.losses.spelling import PYTHON, Spelling

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
_OPTIONS = ("tail", "beta", "reverse", "clip")


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
        _check_options(self.kind, {name: getattr(self, name) for name in _OPTIONS}, PYTHON)

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
    def named(cls, kind: str, spelling: Spelling = PYTHON, **options: Any) -> Objective:
        """The objective of a kind, with the options given and defaults for the others: for command lines.

        What ObjectiveError says is spelled as `spelling` does.
        """
        for name in options:
            if name not in _OPTIONS:
                raise ObjectiveError(f"objectives have no option {name!r}; they have {', '.join(_OPTIONS)}")
        options = {**_FIELDS.get(kind, {}), **options}
        _check_options(kind, options, spelling)
        return cls(kind, **options)

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

    def _name(self, spelling: Spelling) -> str:
        kind = spelling.kind(self.kind)
        if self.tail is None:
            return kind
        tail = spelling.option("tail", self.tail)
        return tail if self.kind == "forward_kl" else f"{kind} with {tail}"

    def check(
        self,
        unbiased: bool,
        temperature: float = 1.0,
        alpha: float | torch.Tensor = 1.0,
        has_exact_head: bool = False,
        has_label_logprob: bool = True,
        has_ids: bool = True,
        spelling: Spelling = PYTHON,
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
            spelling: how the message names options.

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
                    f"{spelling.kind(self.kind)} needs the teacher's log-probability of every label, which these "
                    "targets do not hold; use a cache that `dump` wrote and whose label_logprob was not dropped"
                )
        elif not has_ids:
            raise ObjectiveError(
                f"{self._name(spelling)} needs the teacher's probabilities of ids, but these targets hold none "
                "(--select label keeps the labels' log-probabilities only); use "
                f"{spelling.kind('policy_gradient')}, or dump with another --select"
            )
        elif unbiased:
            self._check_samples(has_exact_head, spelling)
        elif self.tail in ("unbiased", "blend"):
            spec = "sample:N or varopt:K" if self.tail == "unbiased" else "varopt:K"
            raise ObjectiveError(
                f"{self._name(spelling)} needs sampled targets, but these hold probabilities of top-k or top-p; use "
                f"{spelling.option('tail', 'bucket')}, or dump a cache with --select {spec}"
            )
        self._check_temperature(unbiased, temperature, spelling)

    def _check_samples(self, has_exact_head: bool, spelling: Spelling) -> None:
        """Raise ObjectiveError unless unbiased targets can be used: as they are, or the exact head of them."""
        needs_head = self.reads_exact_head or self.tail == "blend"
        if self.tail == "unbiased" or (needs_head and has_exact_head):
            return
        name, tail, is_forward = self._name(spelling), partial(spelling.option, "tail"), self.kind == "forward_kl"
        sampled = tail("unbiased") if is_forward else f"{spelling.kind('forward_kl')} with {tail('unbiased')}"
        if needs_head:
            also = {"bucket": " (it serves both), top-k:K or top-p:P:K", "blend": ""}
            raise ObjectiveError(
                f"{name} needs exact probabilities, but none of these samples is exact; use {sampled}, or dump "
                f"a cache with --select varopt:K{also.get(str(self.tail), ', top-k:K or top-p:P:K')}"
            )
        if has_exact_head:
            sampled = tail("unbiased", "bucket") if is_forward else tail("bucket")
        raise ObjectiveError(
            f"{name} needs probabilities, but these targets are unbiased samples; use {sampled}, "
            "or dump a cache with --select top-k:K or top-p:P:K"
        )

    def _check_temperature(self, unbiased: bool, temperature: float, spelling: Spelling) -> None:
        """Raise ObjectiveError unless the divergence can be had at this temperature from what is stored."""
        if temperature == 1 or self.tail == "renormalised" or self.kind == "decoupled":
            return
        given, plain = f"{spelling.name('temperature')} is {temperature}", spelling.option("temperature", 1)
        renormalised = spelling.option("tail", "renormalised")
        if self.kind in ("mse", "policy_gradient"):
            raise ObjectiveError(f"{given}, but {spelling.kind(self.kind)} has none; use {plain}")
        if unbiased:
            raise ObjectiveError(
                f"{given}, but sampled weights are unbiased at temperature 1 only; use {plain}, or {renormalised} "
                "with a cache dumped with --select top-k:K"
            )
        raise ObjectiveError(
            f"{given}, but {self._name(spelling)} needs the teacher's tail mass at that temperature, and the cache "
            f"stores it at temperature 1; use {renormalised}, or {plain}"
        )


def _check_options(kind: str, options: Mapping[str, Any], spelling: Spelling) -> None:
    """Raise ObjectiveError for an unknown kind, an option that it does not have, and one out of range."""
    if kind not in KINDS:
        raise ObjectiveError(f"objective kind {kind!r} does not exist; use one of {', '.join(KINDS)}")
    fields, name = _FIELDS[kind], spelling.name
    for option, value in options.items():
        if option not in fields and value is not None:
            raise ObjectiveError(
                f"{spelling.kind(kind)} has no {name(option)}, but {name(option)} is {value!r}; leave it out"
            )
    tails = TAILS if kind == "forward_kl" else CLASS_TAILS
    if "tail" in fields and (tail := options.get("tail")) not in tails:
        raise ObjectiveError(
            f"{name('tail')} {tail!r} does not exist for {spelling.kind(kind)}; use one of {', '.join(tails)}"
        )
    if "beta" in fields:
        _check_beta(kind, options.get("beta"), spelling)
    if "reverse" in fields and not isinstance(reverse := options.get("reverse"), bool):
        raise ObjectiveError(f"{name('reverse')} is {reverse!r}; it must be True or False")
    clip = options.get("clip")
    if clip is not None and not (_is_number(clip) and math.isfinite(clip) and clip > 0):
        raise ObjectiveError(
            f"{name('clip')} is {clip!r}; it must be a finite number of nats above 0; leave it out for none"
        )


def _check_beta(kind: str, beta: Any, spelling: Spelling) -> None:
    """jsd vanishes at both ends; skew_kl is a KL divergence at 0 and vanishes at 1."""
    given = f"{spelling.name('beta')} is {beta!r}"
    if kind == "jsd" and not (_is_number(beta) and 0 < beta < 1):
        raise ObjectiveError(
            f"{given}; it must be a number in (0, 1), as jsd is 0 at both ends: use {spelling.kind('forward_kl')} or "
            f"{spelling.kind('reverse_kl')}, which it becomes there when divided by beta or by 1 - beta"
        )
    if kind == "skew_kl" and not (_is_number(beta) and 0 <= beta < 1):
        raise ObjectiveError(f"{given}; it must be a number in [0, 1), as {kind} is 0 at 1")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
