"""Every argument of the loss that is refused, and what the message says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from logitcache.errors import LogitcacheError, ObjectiveError, TargetsError
from logitcache.losses import HeadOptions, Objective, distillation_loss, distillation_terms
from logitcache.targets import DeviceTargets, SparseTargets

HIDDEN, WEIGHT, LABELS = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([1, -100])
SPARSE = SparseTargets(offsets=[0, 2, 3], ids=[0, 4, 1], weights=[0.5, 0.25, 1.0])
DEVICE = SPARSE.to_device()


def swap(**fields: object) -> DeviceTargets:
    return replace(DEVICE, **fields)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": HIDDEN[None]}, ObjectiveError, "hidden has shape \\(1, 2, 3\\).*flatten"),
        ({"hidden": HIDDEN[:, :2]}, ObjectiveError, "width 2"),
        ({"hidden": HIDDEN.int()}, ObjectiveError, "hidden is torch.int32"),
        ({"hidden": HIDDEN.to("meta")}, ObjectiveError, "hidden is on meta"),
        ({"labels": LABELS.int()}, ObjectiveError, "labels is torch.int32"),
        ({"labels": [1, 2]}, ObjectiveError, "labels is list"),
        ({"labels": LABELS[:1]}, ObjectiveError, "labels has shape \\(1,\\), but hidden has 2 rows"),
        ({"labels": LABELS.to("meta")}, ObjectiveError, "labels is on meta"),
        ({"labels": torch.tensor([1, 5])}, ObjectiveError, "labels holds 5 in row 1.*5 valid columns"),
        ({"labels": torch.tensor([-1, 0])}, ObjectiveError, "labels holds -1 in row 0.*ignore_index"),
        ({"labels": torch.tensor([4, 0]), "alpha": 0, "valid_vocab": 4}, ObjectiveError, "labels holds 4"),
        ({"alpha": 1.5}, ObjectiveError, "alpha is 1.5"),
        ({"alpha": torch.zeros(3)}, ObjectiveError, "alpha has shape \\(3,\\)"),
        ({"temperature": 0}, ObjectiveError, "temperature is 0"),
        ({"temperature": 2.0}, ObjectiveError, "use tail='renormalised', or temperature=1"),
        ({"objective": Objective.forward_kl("unbiased")}, ObjectiveError, "--select sample:N"),
        ({"alpha": torch.tensor(1.5)}, ObjectiveError, "alpha holds a number outside"),
        ({"alpha": torch.tensor([0.5, 1.5])}, ObjectiveError, "alpha holds a number outside"),
        ({"blend": torch.tensor(-0.5)}, ObjectiveError, "blend holds a number outside"),
        ({"normalizer": torch.tensor(0.0)}, ObjectiveError, "normalizer is 0.0"),
        ({"temperature": "1"}, ObjectiveError, "temperature is '1'"),
        ({"logit_scale": 0.0}, ObjectiveError, "logit_scale is 0.0"),
        ({"valid_vocab": 4.5}, ObjectiveError, "valid_vocab is 4.5"),
        ({"targets": swap(weights=3 + DEVICE.weights)}, TargetsError, "sum to more than 1"),
        ({"impl": "fast"}, ObjectiveError, "auto, reference, split, chunk, triton"),
        ({"impl": "fast", "alpha": 0}, ObjectiveError, "auto, reference, split, chunk, triton"),
        ({"reduction": "avg"}, ObjectiveError, "reduction is 'avg'; use one of mean, sum, none"),
        ({"normalizer": 0}, ObjectiveError, "normalizer is 0"),
        ({"normalizer": torch.ones(2)}, ObjectiveError, "normalizer has shape \\(2,\\)"),
        ({"normalizer": 3, "reduction": "sum"}, ObjectiveError, "normalizer divides the mean only"),
        ({"bias": torch.zeros(4)}, ObjectiveError, "bias has shape \\(4,\\)"),
        ({"objective": "jsd"}, ObjectiveError, "objective is 'jsd'; build one"),
        ({"blend": 1.5}, ObjectiveError, "blend is 1.5; it must be a number in \\[0, 1\\]"),
        ({"blend": True}, ObjectiveError, "blend is True"),
        ({"blend": torch.zeros(3)}, ObjectiveError, "blend has shape \\(3,\\)"),
        ({"z_loss": -1e-4}, ObjectiveError, "z_loss is -0.0001; it must be a finite number, 0 or above"),
        ({"z_loss": float("nan")}, ObjectiveError, "z_loss is nan"),
        ({"z_loss": -1, "alpha": 0}, ObjectiveError, "z_loss is -1"),
        ({"objective": Objective.forward_kl("blend")}, ObjectiveError, "--select varopt:K"),
        ({"objective": Objective.policy_gradient(), "temperature": 2.0}, ObjectiveError, "policy_gradient has none"),
        ({"objective": Objective.policy_gradient()}, TargetsError, "label_logprob is nan in row 0.*policy_gradient"),
        ({"softcap": -1.0}, ObjectiveError, "softcap is -1.0"),
        ({"valid_vocab": 9}, ObjectiveError, "valid_vocab is 9"),
        ({"valid_vocab": 4}, TargetsError, "row 0 holds token id 4"),
        ({"targets": None}, ObjectiveError, "targets is None"),
        ({"targets": [0, 1]}, TargetsError, "targets is a list"),
        ({"targets": SPARSE.slice(0, 1)}, TargetsError, "targets has 1 rows, but hidden has 2"),
        ({"targets": swap(ids=DEVICE.ids.int())}, TargetsError, "targets.ids is torch.int32"),
        ({"targets": swap(ids=DEVICE.ids[0], weights=DEVICE.weights[0])}, TargetsError, "must be int64 \\[N, K\\]"),
        ({"targets": swap(weights=DEVICE.weights[:, :1])}, TargetsError, "targets.weights is"),
        ({"targets": swap(weights=DEVICE.ids)}, TargetsError, "floating point"),
        ({"targets": swap(tail_mass=torch.zeros(1))}, TargetsError, "targets.tail_mass is"),
        ({"targets": swap(threshold=torch.zeros(1))}, TargetsError, "targets.threshold is"),
        ({"targets": swap(label_logprob=torch.zeros(1))}, TargetsError, "targets.label_logprob is"),
        ({"targets": swap(entropy=torch.zeros(2).to("meta"))}, TargetsError, "targets.entropy is on meta"),
        ({"targets": swap(ids=torch.tensor([[4, 0], [1, -1]]))}, TargetsError, "not ascending.*row 0"),
        ({"targets": swap(ids=torch.tensor([[0, 4], [1, 1]]))}, TargetsError, "not ascending and unique.*row 1"),
        ({"targets": swap(ids=torch.tensor([[0, 4], [-1, 1]]))}, TargetsError, "padding \\(-1\\) at the end.*row 1"),
        ({"targets": swap(ids=torch.tensor([[0, 5], [1, -1]]))}, TargetsError, "outside the head's 5.*row 0"),
        ({"targets": swap(weights=-DEVICE.weights)}, TargetsError, "negative or not finite"),
        ({"targets": swap(weights=DEVICE.weights / 0)}, TargetsError, "negative or not finite"),
        ({"targets": swap(tail_mass=torch.tensor([0.0, 2.0]))}, TargetsError, "outside \\[0, 1\\] \\(row 1\\)"),
    ],
)
def test_refused(change, error, words):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "targets": SPARSE, **change}
    positional = [arguments.pop(name) for name in ("hidden", "weight", "labels", "targets")]
    for impl in [arguments.pop("impl")] if "impl" in change else ["auto", "reference"]:
        with pytest.raises(error, match=words) as caught:
            distillation_loss(*positional, impl=impl, **arguments)
        assert isinstance(caught.value, LogitcacheError)


def test_a_policy_gradient_names_the_first_counted_row_without_a_log_probability():
    given = swap(label_logprob=torch.tensor([-1.0, float("nan")]))
    labels, objective = torch.tensor([1, 2]), Objective.policy_gradient()
    with pytest.raises(TargetsError, match=r"label_logprob is nan in row 1, whose label counts.*ignore_index"):
        distillation_loss(HIDDEN, WEIGHT, labels, given, objective, alpha=1.0)
    assert torch.isfinite(distillation_loss(HIDDEN, WEIGHT, LABELS, given, objective, alpha=1.0))
    with pytest.raises(TargetsError, match="label_logprob is -inf in row 0"):
        distillation_loss(HIDDEN, WEIGHT, LABELS, swap(label_logprob=torch.full((2,), -torch.inf)), objective)
    with pytest.raises(ObjectiveError, match="labels holds 7 in row 0"):
        distillation_loss(HIDDEN, WEIGHT, torch.tensor([7, 0]), given, objective, alpha=1.0)


def test_terms_without_cross_entropy_cannot_be_mixed_with_it():
    terms = distillation_terms(HIDDEN, WEIGHT, LABELS, SPARSE, with_ce=False)
    assert terms.ce is None
    assert torch.isfinite(terms.loss(1.0))
    with pytest.raises(ObjectiveError, match="with_ce=True"):
        terms.loss(0.5)


def test_targets_are_not_looked_at_when_nothing_reads_them():
    for options in ({"alpha": 0.0}, {"objective": Objective.cross_entropy()}):
        for targets in (None, SPARSE.slice(0, 1)):
            assert torch.isfinite(distillation_loss(HIDDEN, WEIGHT, LABELS, targets, **options))
    terms = distillation_terms(HIDDEN, WEIGHT, LABELS, None, Objective.cross_entropy(), head=HeadOptions())
    assert terms.divergence is None
    assert torch.isfinite(terms.loss(0.5))
