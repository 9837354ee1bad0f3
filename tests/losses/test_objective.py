"""Objectives as values: JSON, names, and combinations without a meaning."""

from __future__ import annotations

import json

import pytest
import torch

from logitcache.errors import ObjectiveError
from logitcache.losses import TAILS, Objective

ALL = [Objective.cross_entropy(), *(Objective.forward_kl(tail) for tail in TAILS)]


@pytest.mark.parametrize("objective", ALL)
def test_json_round_trip(objective):
    assert Objective.from_dict(json.loads(json.dumps(objective.to_dict()))) == objective
    assert hash(objective) == hash(Objective.from_dict(objective.to_dict()))


def test_stored_form():
    """Run records hold these literally."""
    assert Objective.cross_entropy().to_dict() == {"kind": "cross_entropy"}
    assert Objective.forward_kl().to_dict() == {"kind": "forward_kl", "tail": "bucket"}


def test_defaults():
    assert Objective.default_for(unbiased=False) == Objective.forward_kl("bucket")
    assert Objective.default_for(unbiased=True) == Objective.forward_kl("unbiased")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "reverse_kl"}, "'reverse_kl' does not exist; use one of cross_entropy, forward_kl"),
        ({"kind": "forward_kl", "tail": "head"}, "tail 'head' does not exist; use one of bucket"),
        ({"kind": "forward_kl"}, "tail None does not exist"),
        ({"kind": "cross_entropy", "tail": "bucket"}, "cross_entropy has no tail"),
        ({"kind": "cross_entropy", "beta": 1}, "unknown keys beta"),
        ({"tail": "bucket"}, "no 'kind'"),
        ("forward_kl", "is a mapping"),
    ],
)
def test_unknown_values_are_refused(values, words):
    with pytest.raises(ObjectiveError, match=words):
        Objective.from_dict(values)


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


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), float("inf"), True, "0.5", None])
def test_alpha_out_of_range(alpha):
    for objective in ALL:
        with pytest.raises(ObjectiveError, match="alpha is"):
            objective.check(unbiased=False, alpha=alpha)


def test_combinations_with_a_meaning():
    for tail in TAILS:
        Objective.forward_kl(tail).check(unbiased=tail == "unbiased", alpha=torch.tensor(3.0))
    for temperature in (0.1, 1, 2.0, 100.0):
        Objective.forward_kl("renormalised").check(unbiased=False, temperature=temperature)
    for tail in ("bucket", "unbiased"):
        Objective.forward_kl(tail).check(unbiased=True, has_exact_head=True)
    Objective.cross_entropy().check(unbiased=True, temperature=3.0, alpha=1)
    Objective.forward_kl("bucket").check(unbiased=True, temperature=3.0, alpha=0)
