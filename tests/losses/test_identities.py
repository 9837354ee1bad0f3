"""What is known of the divergences whatever the distributions: signs, bounds, limits, and which equal which.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.losses import Objective, distillation_loss
from logitcache.targets import SparseTargets
from tests.losses.problems import OBJECTIVES, from_rows, name_of

V = 7
DISTANCES = [
    pair[0]
    for pair in OBJECTIVES
    if pair[1] == 1 and pair[0].tail in ("bucket", "renormalised", None) and pair[0].kind != "policy_gradient"
]
logits = st.lists(st.floats(-30, 30, width=32), min_size=V, max_size=V)
EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True)


def probabilities(values: list[float]) -> torch.Tensor:
    return torch.softmax(torch.tensor(values, dtype=torch.float64), 0)


def stored(q_V: torch.Tensor, ids: list[int]) -> SparseTargets:
    """One row of these ids' float32 probabilities, and the tail as it is."""
    outside = torch.ones(V, dtype=torch.bool)
    outside[ids] = False
    return from_rows([[np.array(ids, dtype=np.int64), q_V[ids].numpy()]], tail_mass=[float(q_V[outside].sum())])


def value(objective: Objective, z: torch.Tensor, targets: SparseTargets, temperature: float = 1.0) -> float:
    """The loss at alpha = 1 of one row whose logits are z [V]: T^2 times the divergence."""
    head, label = torch.eye(V, dtype=torch.float64), torch.tensor([0])
    return float(distillation_loss(z[None].double(), head, label, targets, objective, 1.0, temperature))


def dense(z: torch.Tensor, q_V: torch.Tensor, reverse: bool = False) -> float:
    """KL over the whole vocabulary of float32 probabilities."""
    log_p, log_q = z.double().log_softmax(0), q_V.float().double().log()
    return float((log_p.exp() * (log_p - log_q)).sum() if reverse else (log_q.exp() * (log_q - log_p)).sum())


@EXAMPLES
@given(logits, logits, st.sets(st.integers(0, V - 1), min_size=1, max_size=V))
@pytest.mark.parametrize("objective", DISTANCES, ids=name_of)
def test_never_negative_and_bounded(
    objective: Objective, student: list[float], teacher: list[float], ids: set[int]
) -> None:
    found = value(objective, torch.tensor(student), stored(probabilities(teacher), sorted(ids)))
    assert np.isfinite(found)
    # The teacher's float32 probabilities do not sum to 1 exactly.
    assert found >= -1e-6
    if objective.kind == "tvd":
        assert found <= 1 + 1e-6
    if objective.kind == "jsd":
        beta = objective.beta
        assert found <= -beta * np.log(beta) - (1 - beta) * np.log(1 - beta) + 1e-6


@EXAMPLES
@given(logits, st.sets(st.integers(0, V - 1), min_size=1, max_size=V))
@pytest.mark.parametrize("objective", DISTANCES, ids=name_of)
def test_zero_where_the_student_is_the_teacher(objective: Objective, values: list[float], ids: set[int]) -> None:
    """To the rounding of the teacher's float32 probabilities, and without a gradient beyond it."""
    z = torch.tensor(values, dtype=torch.float64)[None].requires_grad_()
    targets = stored(probabilities(values), sorted(ids))
    head, label = torch.eye(V, dtype=torch.float64), torch.tensor([0])
    found = distillation_loss(z, head, label, targets, objective, 1.0)
    assert abs(found.item()) < 1e-6
    bound = 0.51 if objective.kind == "tvd" else 1e-6
    assert torch.autograd.grad(found, z)[0].abs().max() < bound


@EXAMPLES
@given(logits, logits)
def test_arguments_swapped(student: list[float], teacher: list[float]) -> None:
    """Over the whole vocabulary, reverse KL is forward KL of the swapped pair, and jsd(1/2) and tvd are symmetric."""
    z, t = torch.tensor(student, dtype=torch.float64), torch.tensor(teacher, dtype=torch.float64)
    everything = list(range(V))
    there, back = stored(torch.softmax(t, 0), everything), stored(torch.softmax(z, 0), everything)
    forward = value(Objective.forward_kl(), t, back)
    assert value(Objective.reverse_kl(), z, there) == pytest.approx(forward, rel=1e-5, abs=1e-5)
    for objective in (Objective.jsd(), Objective.tvd()):
        assert value(objective, z, there) == pytest.approx(value(objective, t, back), rel=1e-5, abs=1e-5)
    skew = value(Objective.skew_kl(0.2), t, back)
    assert value(Objective.skew_kl(0.2, reverse=True), z, there) == pytest.approx(skew, rel=1e-5, abs=1e-5)
    assert forward == pytest.approx(dense(t, torch.softmax(z, 0)), rel=1e-5, abs=1e-5)


PAIR = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0, 2.0]), torch.tensor([0.3, 1.0, -1.0, 2.5, -3.0, 0.2, 0.0])


@pytest.mark.parametrize("tail", ["bucket", "renormalised"])
def test_limits_of_jsd(tail: str) -> None:
    """JSD / beta -> KL(q || p) at beta -> 0, JSD / (1 - beta) -> KL(p || q) at beta -> 1."""
    student, teacher = PAIR
    targets = stored(torch.softmax(teacher, 0), [0, 2, 3, 5])
    forward, reverse = (
        value(kind, student, targets) for kind in (Objective.forward_kl(tail), Objective.reverse_kl(tail))
    )
    small = 1e-6
    assert value(Objective.jsd(small, tail), student, targets) / small == pytest.approx(forward, rel=1e-4)
    assert value(Objective.jsd(1 - small, tail), student, targets) / small == pytest.approx(reverse, rel=1e-4)


@pytest.mark.parametrize("tail", ["bucket", "renormalised"])
def test_skew_without_a_skew_is_the_plain_divergence(tail: str) -> None:
    student, teacher = PAIR
    targets = stored(torch.softmax(teacher, 0), [0, 2, 3, 5])
    for reverse, plain in ((False, Objective.forward_kl(tail)), (True, Objective.reverse_kl(tail))):
        expected = value(plain, student, targets)
        for beta, tolerance in ((0.0, 1e-12), (1e-9, 1e-6)):
            found = value(Objective.skew_kl(beta, reverse, tail), student, targets)
            assert found == pytest.approx(expected, rel=tolerance)


def test_half_a_skew_is_half_a_jsd() -> None:
    """JSD(1/2) is the mean of both skew divergences at 1/2."""
    student, teacher = PAIR
    targets = stored(torch.softmax(teacher, 0), [0, 2, 3, 5])
    both = [value(Objective.skew_kl(0.5, reverse), student, targets) for reverse in (False, True)]
    assert value(Objective.jsd(0.5), student, targets) == pytest.approx(sum(both) / 2, rel=1e-12)


@EXAMPLES
@given(logits, logits, st.sets(st.integers(0, V - 1), min_size=1, max_size=V))
def test_decoupled_at_temperature_1_is_the_bucket(student: list[float], teacher: list[float], ids: set[int]) -> None:
    """The chain rule of KL."""
    z, targets = torch.tensor(student), stored(probabilities(teacher), sorted(ids))
    bucket = value(Objective.forward_kl(), z, targets)
    assert value(Objective.decoupled(), z, targets) == pytest.approx(bucket, rel=1e-9, abs=1e-9)


def test_only_the_tempered_part_of_decoupled_has_the_factor() -> None:
    """Loss = Bernoulli KL at T = 1 + m T^2 KL_T: with nothing to learn inside S, T does not matter."""
    student = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.5, -1.0, 0.3])
    teacher = torch.softmax(torch.tensor([1.0, 2.0, -3.0, 1.0, 0.5, 0.0, 2.0]), 0)
    targets = stored(teacher, [0, 1])
    losses = [value(Objective.decoupled(), student, targets, temperature) for temperature in (1.0, 2.0, 4.0)]
    assert losses[0] > 0.01
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)
    # And with the right mass on S, only the tempered part is left.
    inside = torch.tensor([2.0, 1.0, -3.0, 1.0, 0.5, 0.0, 2.0])
    expected = float(teacher[:2].sum()) * value(Objective.forward_kl("renormalised"), inside, targets, 2.0)
    assert value(Objective.decoupled(), inside, targets, 2.0) == pytest.approx(expected, rel=1e-5)


@EXAMPLES
@given(logits, logits, st.floats(-5, 5))
def test_mse_does_not_see_a_constant(student: list[float], teacher: list[float], constant: float) -> None:
    """Of either side: logits and log-probabilities are the same teacher."""
    z, targets = torch.tensor(student), stored(probabilities(teacher), [0, 2, 3, 5])
    found = value(Objective.mse(), z, targets)
    shifted = z.double()
    shifted[[0, 2, 3, 5]] += constant
    assert value(Objective.mse(), shifted, targets) == pytest.approx(found, rel=1e-6, abs=1e-6)
    gap = (z.double() - torch.tensor(teacher, dtype=torch.float64))[[0, 2, 3, 5]]
    assert found == pytest.approx(float(gap.var(correction=0)), rel=1e-3, abs=1e-3)


def test_the_policy_gradient_is_that_of_reverse_kl_on_average() -> None:
    """Over all tokens a, weighted with p(a): sum of p(a) A(a) (p - e_a) = d KL(p || q) / dz."""
    student, teacher = (values.double() for values in PAIR)
    log_q = teacher.log_softmax(0)
    p = torch.softmax(student, 0)
    hidden = student.expand(V, V).clone().requires_grad_()
    rows = [[[0], [1.0]] for _ in range(V)]
    targets = from_rows(rows, label_logprob=log_q.numpy())
    head = torch.eye(V, dtype=torch.float64)
    loss = distillation_loss(hidden, head, torch.arange(V), targets, Objective.policy_gradient(), 1.0, reduction="none")
    mean = torch.autograd.grad((loss * p).sum(), hidden)[0].sum(0)
    z = student.clone().requires_grad_()
    kl = (torch.softmax(z, 0) * (z.log_softmax(0) - log_q)).sum()
    torch.testing.assert_close(mean, torch.autograd.grad(kl, z)[0], rtol=1e-5, atol=1e-7)
