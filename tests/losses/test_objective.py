"""Objectives as values: JSON, names, and combinations without a meaning."""

from __future__ import annotations

import json

import pytest
import torch

from logitcache.errors import ObjectiveError
from logitcache.losses import KINDS, TAILS, Objective
from logitcache.losses.spelling import OPTIONS
from tests.losses.problems import OBJECTIVES, name_of

ALL = [Objective.cross_entropy(), *(pair[0] for pair in OBJECTIVES)]
SAMPLED = [Objective.forward_kl("unbiased"), Objective.forward_kl("blend")]


@pytest.mark.parametrize("objective", ALL)
def test_json_round_trip(objective):
    assert Objective.from_dict(json.loads(json.dumps(objective.to_dict()))) == objective
    assert hash(objective) == hash(Objective.from_dict(objective.to_dict()))


def test_stored_form():
    """Run records hold these literally."""
    assert Objective.cross_entropy().to_dict() == {"kind": "cross_entropy"}
    assert Objective.forward_kl().to_dict() == {"kind": "forward_kl", "tail": "bucket"}
    assert Objective.reverse_kl().to_dict() == {"kind": "reverse_kl", "tail": "bucket"}
    assert Objective.jsd().to_dict() == {"kind": "jsd", "tail": "bucket", "beta": 0.5}
    assert Objective.skew_kl().to_dict() == {"kind": "skew_kl", "tail": "bucket", "beta": 0.1, "reverse": False}
    assert Objective.tvd("renormalised").to_dict() == {"kind": "tvd", "tail": "renormalised"}
    assert Objective.decoupled().to_dict() == {"kind": "decoupled"}
    assert Objective.mse().to_dict() == {"kind": "mse"}
    assert Objective.policy_gradient(5).to_dict() == {"kind": "policy_gradient", "clip": 5}
    assert Objective.policy_gradient().to_dict() == {"kind": "policy_gradient", "clip": None}


@pytest.mark.parametrize("kind", KINDS)
def test_named_gives_what_the_constructor_gives(kind):
    assert Objective.named(kind) == getattr(Objective, kind)()
    assert {objective.kind for objective in ALL} == set(KINDS)


def test_named_with_options():
    assert Objective.named("jsd", beta=0.3) == Objective.jsd(0.3)
    assert Objective.named("skew_kl", reverse=True, tail="renormalised") == Objective.skew_kl(0.1, True, "renormalised")
    with pytest.raises(ObjectiveError, match="mse has no tail, but tail is 'bucket'; leave it out"):
        Objective.named("mse", tail="bucket")
    with pytest.raises(ObjectiveError, match="'hinge' does not exist; use one of cross_entropy, forward_kl"):
        Objective.named("hinge", tail="bucket")


def test_defaults():
    assert Objective.default_for(unbiased=False) == Objective.forward_kl("bucket")
    assert Objective.default_for(unbiased=True) == Objective.forward_kl("unbiased")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "hinge"}, "'hinge' does not exist; use one of cross_entropy, forward_kl"),
        ({"kind": "hinge", "margin": 1}, "'hinge' does not exist"),
        ({"kind": ["jsd"]}, "does not exist"),
        ({"kind": "forward_kl", "tail": "head"}, "tail 'head' does not exist for forward_kl; use one of bucket"),
        ({"kind": "forward_kl"}, "tail None does not exist"),
        ({"kind": "tvd", "tail": "unbiased"}, "'unbiased' does not exist for tvd; use one of bucket, renormalised"),
        ({"kind": "jsd", "tail": "bucket"}, "beta is None"),
        ({"kind": "jsd", "tail": "bucket", "clip": 1}, "unknown keys clip; jsd has kind, tail, beta"),
        ({"kind": "decoupled", "tail": "bucket"}, "unknown keys tail; decoupled has kind"),
        ({"kind": "skew_kl", "tail": "bucket", "beta": 0.1}, "reverse is None; it must be True or False"),
        ({"kind": "cross_entropy", "tail": "bucket"}, "unknown keys tail; cross_entropy has kind"),
        ({"kind": "cross_entropy", "beta": 1}, "unknown keys beta"),
        ({"tail": "bucket"}, "no 'kind'"),
        ("forward_kl", "is a mapping"),
    ],
)
def test_unknown_values_are_refused(values, words):
    with pytest.raises(ObjectiveError, match=words):
        Objective.from_dict(values)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        *((lambda beta=beta: Objective.jsd(beta), f"beta is {beta}.*\\(0, 1\\)") for beta in (0, 1, -0.1, 2, None)),
        *((lambda beta=beta: Objective.skew_kl(beta), f"beta is {beta}.*\\[0, 1\\)") for beta in (1, -0.1, True)),
        (lambda: Objective.jsd(float("nan")), "beta is nan"),
        (lambda: Objective.skew_kl("0.1"), "beta is '0.1'"),
        (lambda: Objective.skew_kl(reverse=1), "reverse is 1"),
        *((lambda clip=clip: Objective.policy_gradient(clip), f"clip is {clip}") for clip in (0, -1.0, True)),
        (lambda: Objective.policy_gradient(float("inf")), "clip is inf; .*above 0; leave it out for none"),
        (lambda: Objective("cross_entropy", "bucket"), "cross_entropy has no tail"),
        (lambda: Objective("reverse_kl", "bucket", beta=0.5), "reverse_kl has no beta, but beta is 0.5; leave it out"),
        (lambda: Objective("mse", reverse=False), "mse has no reverse"),
        (lambda: Objective("jsd", "bucket", 0.5, clip=1.0), "jsd has no clip"),
    ],
)
def test_options_out_of_range(build, words):
    with pytest.raises(ObjectiveError, match=words):
        build()


@pytest.mark.parametrize(
    ("tail", "unbiased", "temperature", "words"),
    [
        ("unbiased", False, 1.0, "use tail='bucket', or dump a cache with --select sample:N or varopt:K"),
        (
            "bucket",
            True,
            1.0,
            "use tail='unbiased', or dump a cache with --select varopt:K \\(it serves both\\)",
        ),
        ("renormalised", True, 2.0, "use tail='unbiased'"),
        ("label", True, 1.0, "use tail='unbiased'"),
        ("unnormalised", True, 1.0, "use tail='unbiased'"),
        ("unbiased", True, 2.0, "unbiased at temperature 1 only; use temperature=1"),
        ("bucket", False, 2.0, "tail mass at that temperature.*use tail='renormalised', or temperature=1"),
        ("label", False, 0.5, "use tail='renormalised', or temperature=1"),
        ("unnormalised", False, 2.0, "use tail='renormalised', or temperature=1"),
        ("renormalised", False, 0.0, "temperature is 0.0"),
        ("renormalised", False, -1.0, "temperature is -1.0"),
        ("renormalised", False, float("nan"), "temperature is nan"),
        ("renormalised", False, float("inf"), "temperature is inf"),
    ],
)
def test_combinations_without_a_meaning(tail, unbiased, temperature, words):
    with pytest.raises(ObjectiveError, match=words):
        Objective.forward_kl(tail).check(unbiased=unbiased, temperature=temperature, alpha=0.5)


@pytest.mark.parametrize(
    ("tail", "temperature", "words"),
    [
        ("renormalised", 1.0, "use tail='unbiased' or 'bucket', or dump a cache with --select top-k:K"),
        ("label", 1.0, "use tail='unbiased' or 'bucket'"),
        ("bucket", 2.0, "unbiased at temperature 1 only; use temperature=1"),
    ],
)
def test_what_an_exact_head_does_not_allow(tail, temperature, words):
    with pytest.raises(ObjectiveError, match=words):
        Objective.forward_kl(tail).check(unbiased=True, temperature=temperature, has_exact_head=True)


@pytest.mark.parametrize(
    ("objective", "options", "words"),
    [
        (Objective.forward_kl("blend"), {}, "hold probabilities of top-k.*use tail='bucket'.*--select varopt:K$"),
        (
            Objective.forward_kl("blend"),
            {"unbiased": True},
            "none of these samples is exact; use tail='unbiased', or dump a cache with --select varopt:K$",
        ),
        (
            Objective.forward_kl("blend"),
            {"unbiased": True, "has_exact_head": True, "temperature": 2.0},
            "unbiased at temperature 1 only",
        ),
        *(
            (
                objective,
                {"unbiased": True},
                "needs exact probabilities.*use forward_kl with tail='unbiased', or dump .* varopt:K, top-k:K or top-p",
            )
            for objective in (Objective.decoupled(), Objective.mse())
        ),
        *(
            (
                objective,
                {"unbiased": True},
                "exact.*use forward_kl with tail='unbiased', or dump .* varopt:K \\(it serves",
            )
            for objective in (Objective.jsd(), Objective.reverse_kl())
        ),
        (
            Objective.tvd("renormalised"),
            {"unbiased": True},
            "tvd with tail='renormalised' needs probabilities.*use forward_kl with tail='unbiased', or dump .* top-k",
        ),
        (
            Objective.tvd("renormalised"),
            {"unbiased": True, "has_exact_head": True},
            "needs probabilities, but these targets are unbiased samples; use tail='bucket', or",
        ),
        *(
            (
                objective,
                {"temperature": 2.0},
                "with tail='bucket' needs the teacher's tail mass at that .*use tail='renormalised', or temperature=1",
            )
            for objective in (Objective.jsd(), Objective.reverse_kl(), Objective.skew_kl(), Objective.tvd())
        ),
        (Objective.mse(), {"temperature": 2.0}, "temperature is 2.0, but mse has none; use temperature=1"),
        (Objective.policy_gradient(), {"temperature": 0.5}, "policy_gradient has none; use temperature=1"),
        (
            Objective.policy_gradient(),
            {"has_label_logprob": False},
            "needs the teacher's log-probability of every label",
        ),
    ],
)
def test_what_other_objectives_ask_of_a_cache(objective, options, words):
    with pytest.raises(ObjectiveError, match=words):
        objective.check(**{"unbiased": False, **options})
    objective.check(**{"unbiased": False, **options}, alpha=0)


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (
            Objective.tvd(),
            {"unbiased": True},
            "--objective tvd with --tail bucket needs exact probabilities, but none of these samples is exact; use "
            "--objective forward-kl with --tail unbiased, or dump a cache with --select varopt:K (it serves both), "
            "top-k:K or top-p:P:K",
        ),
        (
            Objective.forward_kl("label"),
            {"unbiased": True, "has_exact_head": True},
            "--tail label needs probabilities, but these targets are unbiased samples; use --tail unbiased or bucket, "
            "or dump a cache with --select top-k:K or top-p:P:K",
        ),
        (
            Objective.forward_kl(),
            {"temperature": 2},
            "--temperature is 2, but --tail bucket needs the teacher's tail mass at that temperature, and the cache "
            "stores it at temperature 1; use --tail renormalised, or --temperature 1",
        ),
        (
            Objective.mse(),
            {"has_ids": False},
            "--objective mse needs the teacher's probabilities of ids, but these targets hold none (--select label "
            "keeps the labels' log-probabilities only); use --objective policy-gradient, or dump with another --select",
        ),
    ],
)
def test_messages_for_who_wrote_options(objective, options, message):
    with pytest.raises(ObjectiveError) as raised:
        objective.check(**{"unbiased": False, **options}, spelling=OPTIONS)
    assert str(raised.value) == message


@pytest.mark.parametrize(("objective", "temperature"), OBJECTIVES, ids=name_of)
def test_objectives_have_a_meaning_where_they_are_tested(objective, temperature):
    objective.check(unbiased=objective in SAMPLED, temperature=temperature, has_exact_head=True)
    if objective.reads_exact_head:
        objective.check(unbiased=True, temperature=temperature, has_exact_head=True)


def test_policy_gradients_read_any_cache():
    for unbiased in (True, False):
        Objective.policy_gradient().check(unbiased=unbiased)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), float("inf"), True, "0.5", None])
def test_alpha_out_of_range(alpha):
    for objective in ALL:
        with pytest.raises(ObjectiveError, match="alpha is"):
            objective.check(unbiased=False, alpha=alpha)


def test_combinations_with_a_meaning():
    for tail in TAILS:
        sampled = tail in ("unbiased", "blend")
        Objective.forward_kl(tail).check(unbiased=sampled, alpha=torch.tensor(0.7), has_exact_head=tail == "blend")
    for temperature in (0.1, 1, 2.0, 100.0):
        Objective.forward_kl("renormalised").check(unbiased=False, temperature=temperature)
    for tail in ("bucket", "unbiased"):
        Objective.forward_kl(tail).check(unbiased=True, has_exact_head=True)
    Objective.cross_entropy().check(unbiased=True, temperature=3.0, alpha=1)
    Objective.forward_kl("bucket").check(unbiased=True, temperature=3.0, alpha=0)
