"""From options of the command line and a cache to what is minimised."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from logitcache.algebra import Derivation, derive_cache
from logitcache.errors import LogitcacheError, ObjectiveError, UsageError
from logitcache.losses import KINDS, TAILS, Objective, TokenMask
from logitcache.store import Cache, open_cache
from logitcache.training import BlendSchedule
from logitcache.training.options import ObjectiveName, Tail, TrainOptions
from logitcache.training.settings import choose_objective, settings_for
from tests.caches import Dumped


def options(**values: Any) -> TrainOptions:
    return TrainOptions.build({"cache": "c", "student": "s", "out": "o", **values})


def test_every_objective_and_tail_has_its_name() -> None:
    assert [name.replace("-", "_") for name in get_args(ObjectiveName)] == ["auto", *KINDS]
    assert get_args(Tail) == ("auto", *TAILS)


@pytest.mark.parametrize(
    ("values", "unbiased", "expected"),
    [
        ({}, False, Objective.forward_kl("bucket")),
        ({}, True, Objective.forward_kl("unbiased")),
        ({"objective": "forward-kl"}, True, Objective.forward_kl("unbiased")),
        ({"tail": "blend"}, True, Objective.forward_kl("blend")),
        ({"objective": "cross-entropy"}, True, Objective.cross_entropy()),
        ({"objective": "reverse-kl"}, True, Objective.reverse_kl()),
        ({"objective": "reverse-kl", "tail": "renormalised"}, False, Objective.reverse_kl("renormalised")),
        ({"objective": "jsd"}, False, Objective.jsd()),
        ({"objective": "jsd", "beta": 0.2}, False, Objective.jsd(0.2)),
        ({"objective": "skew-kl", "reverse": True}, False, Objective.skew_kl(reverse=True)),
        ({"objective": "tvd"}, False, Objective.tvd()),
        ({"objective": "decoupled"}, False, Objective.decoupled()),
        ({"objective": "mse"}, False, Objective.mse()),
        ({"objective": "policy-gradient", "clip": 2}, True, Objective.policy_gradient(2)),
    ],
)
def test_choice(values: dict[str, Any], unbiased: bool, expected: Objective) -> None:
    assert choose_objective(options(**values), unbiased) == expected


REFUSED: list[tuple[dict[str, Any], str, type[LogitcacheError], str]] = [
    ({"beta": 0.3}, "top_k", UsageError, "--objective forward-kl has no --beta, but --beta is 0.3; leave it"),
    ({"objective": "jsd", "beta": 1}, "top_k", UsageError, "^--beta is 1.0; it must be a number in \\(0, 1\\)"),
    ({"objective": "policy-gradient", "clip": 0}, "top_k", UsageError, "--clip is 0.0"),
    ({"objective": "decoupled", "tail": "bucket"}, "top_k", UsageError, "--objective decoupled has no --tail"),
    ({"objective": "tvd", "tail": "label"}, "top_k", UsageError, "--tail 'label' does not exist for --objective tvd"),
    ({"objective": "tvd"}, "sample", ObjectiveError, "--select varopt:K"),
    ({"objective": "jsd", "temperature": 2}, "top_k", ObjectiveError, "--tail renormalised, or --temperature 1"),
    ({"objective": "mse", "temperature": 2}, "top_k", ObjectiveError, "mse has none"),
    ({"tail": "blend"}, "top_k", ObjectiveError, "--select varopt:K"),
    ({"tail": "blend"}, "sample", ObjectiveError, "--select varopt:K"),
    ({"blend": 0.3}, "varopt", UsageError, "--blend is 0.3, but only --tail blend"),
    ({"mask": "student-entropy:2"}, "top_k", UsageError, "a mask's keep is 2.0"),
    ({"mask": "entropy"}, "top_k", UsageError, "'entropy' is not understood"),
    ({"mask": "student-entropy:0.5", "alpha": 0}, "top_k", UsageError, "--mask is .*, but --alpha is 0"),
    (
        {"mask": "teacher-entropy:1", "objective": "cross-entropy"},
        "top_k",
        UsageError,
        "objective is cross-entropy, so",
    ),
    ({"mask_rest": "nothing"}, "top_k", UsageError, "--mask-rest is nothing, but there is no mask"),
    ({"blend_end": 1}, "top_k", UsageError, "--blend-end is 1.0, but only --tail blend.*--tail blend on a varopt"),
]


@pytest.mark.parametrize(("values", "cache", "error", "words"), REFUSED)
def test_refused(values: dict[str, Any], cache: str, error: type[LogitcacheError], words: str, dumped: Dumped) -> None:
    with pytest.raises(error, match=words):
        settings_for(options(**values), opened(dumped, cache))


def opened(dumped: Dumped, cache: str) -> Cache:
    return open_cache(getattr(dumped, cache))


def test_blend_and_z_loss(dumped: Dumped) -> None:
    chosen = settings_for(options(tail="blend", blend=0, blend_end=1, z_loss=1e-4), opened(dumped, "varopt"))
    assert (chosen.objective.tail, chosen.blend, chosen.z_loss) == ("blend", BlendSchedule(0.0, 1.0), 1e-4)
    assert settings_for(options(tail="blend"), opened(dumped, "varopt")).blend == BlendSchedule(0.5)


def test_a_cache_whose_label_logprob_was_dropped(dumped: Dumped, tmp_path: Path) -> None:
    derive_cache(dumped.top_k, tmp_path / "bare", Derivation(drop=("label_logprob",)))
    for name in ("top_k", "sample", "varopt"):
        assert settings_for(options(objective="policy-gradient"), opened(dumped, name)).objective.kind
    with pytest.raises(ObjectiveError, match="whose label_logprob was not dropped"):
        settings_for(options(objective="policy-gradient"), open_cache(tmp_path / "bare"))


def test_masks(dumped: Dumped) -> None:
    cache = opened(dumped, "top_k")
    for none in ({}, {"mask": "none"}, {"mask": None}):
        assert settings_for(options(**none), cache).mask is None
    assert settings_for(options(mask="teacher-entropy:0.85"), cache).mask == TokenMask()
    chosen = settings_for(options(mask="student-entropy:0.5", mask_rest="nothing"), cache)
    assert chosen.mask == TokenMask("student-entropy", 0.5, "nothing")


def test_a_cache_whose_entropy_was_dropped(dumped: Dumped, tmp_path: Path) -> None:
    derive_cache(dumped.top_k, tmp_path / "bare", Derivation(drop=("entropy",)))
    bare = open_cache(tmp_path / "bare")
    with pytest.raises(UsageError, match=r"bare does not hold the teacher's entropy; .*or --mask student-entropy:0\.5"):
        settings_for(options(mask="teacher-entropy:0.85"), bare)
    assert settings_for(options(mask="student-entropy:0.5"), bare).mask == TokenMask("student-entropy", 0.5)


def test_objectives_may_be_spelt_as_in_python() -> None:
    """Messages of `Objective` reach the command line and say forward_kl."""
    assert options(objective="forward_kl").objective == "forward-kl"
