"""Gradients in the logits, written out by hand for each objective: the table of docs/objectives.md.

Legend: N rows, V vocabulary, S the stored ids of a row, b a class.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from logitcache.losses import Objective
from logitcache.targets import DeviceTargets
from tests.losses.problems import PHI, N, Problem, V, name_of, teacher_probs, varopt_targets

Slopes = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
FLOOR = 2.0**-24


def slope(objective: Objective, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """a_b = d phi / d p_b."""
    beta = objective.beta
    if objective.kind == "reverse_kl" or (objective.kind == "skew_kl" and objective.reverse and beta == 0):
        return torch.log(p / q.masked_fill(q == 0, FLOOR)) + 1
    if objective.kind == "jsd":
        return (1 - beta) * torch.log(p / (beta * q + (1 - beta) * p))
    if objective.kind == "tvd":
        return torch.sign(p - q) / 2
    if objective.reverse:
        mixture = (1 - beta) * q + beta * p
        return torch.log(p / mixture) + 1 - beta * p / mixture
    return -(1 - beta) * q / (beta * q + (1 - beta) * p)


def rows(problem: Problem, targets: DeviceTargets | None = None):
    """(row, p [V], ids, q, tau) of the rows that count."""
    p_NV = torch.softmax(problem.logits(), 1).detach()
    targets = targets or problem.device_targets
    for row in range(N - 1):
        ids = targets.ids[row][targets.ids[row] >= 0]
        weights = targets.weights[row][targets.ids[row] >= 0].double()
        yield row, p_NV[row], ids, weights, targets.tail_mass[row].double()


def logit_gradient(problem: Problem, **options: object) -> torch.Tensor:
    """[N, V] gradient of the summed divergence in the logits, which become the hidden states of an identity head."""
    problem.hidden = (problem.logits() - problem.bias).detach().requires_grad_()
    problem.weight = torch.eye(V, dtype=torch.float64)
    loss = problem.loss(alpha=1.0, reduction="sum", **options)
    return torch.autograd.grad(loss, problem.hidden)[0]


def within(problem: Problem, row: int, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.softmax(problem.logits()[row, ids].detach() / temperature, 0)


@pytest.mark.parametrize(("objective", "temperature"), [pair for pair in PHI if pair[0].tail == "bucket"], ids=name_of)
def test_classes_with_a_bucket(objective: Objective, temperature: float) -> None:
    """(a_tail - sum of p a) p + 1_S p (a - a_tail)."""
    problem = Problem(objective, temperature)
    grad = logit_gradient(problem)
    for row, p, ids, q, tau in rows(problem):
        rest = 1 - p[ids].sum() if len(ids) < V else torch.zeros((), dtype=torch.float64)
        p_b, q_b = torch.cat([p[ids], rest[None]]), torch.cat([q, tau[None]])
        a_b = slope(objective, p_b, q_b)
        a_tail = a_b[-1] if len(ids) < V else torch.zeros((), dtype=torch.float64)
        a_b = torch.cat([a_b[:-1], a_tail[None]])
        expected = (a_tail - (p_b * a_b).sum()) * p
        expected[ids] += p[ids] * (a_b[:-1] - a_tail)
        torch.testing.assert_close(grad[row], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("objective", "temperature"), [pair for pair in PHI if pair[0].tail == "renormalised"], ids=name_of
)
def test_renormalised_classes(objective: Objective, temperature: float) -> None:
    """T p (a - sum of p a) on S, with p and q renormalised there; nothing outside."""
    problem = Problem(objective, temperature)
    grad = logit_gradient(problem)
    for row, _, ids, q, _ in rows(problem):
        expected = torch.zeros(V, dtype=torch.float64)
        if q.sum() > 0:
            heated = q ** (1 / temperature) / (q ** (1 / temperature)).sum()
            p = within(problem, row, ids, temperature)
            a = slope(objective, p, heated)
            if objective.kind == "reverse_kl":
                zero = FLOOR ** (1 / temperature) / (q ** (1 / temperature)).sum()
                a = torch.log(p / torch.where(heated == 0, zero, heated))
            expected[ids] = temperature * p * (a - (p * a).sum())
        torch.testing.assert_close(grad[row], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_decoupled(temperature: float) -> None:
    """The mass of S without a T, what is inside it with T m (softmax_S(z / T) - teacher's)."""
    problem = Problem(Objective.decoupled(), temperature)
    grad = logit_gradient(problem)
    for row, p, ids, q, tau in rows(problem):
        kept, mass = p[ids].sum(), q.sum()
        expected = torch.zeros(V, dtype=torch.float64)
        if len(ids) < V:
            pull = torch.where(kept > 0, mass / kept, 0) - tau / (1 - kept)
            expected = pull * kept * p
            expected[ids] -= pull * p[ids]
        if mass > 0:
            heated = q ** (1 / temperature) / (q ** (1 / temperature)).sum()
            expected[ids] += temperature * mass * (within(problem, row, ids, temperature) - heated)
        torch.testing.assert_close(grad[row], expected, rtol=1e-9, atol=1e-12)


def test_mse() -> None:
    """2 / |S| times the centred gap, on the ids of which the teacher's probability is known."""
    problem = Problem(Objective.mse())
    grad = logit_gradient(problem)
    for row, _, ids, q, _ in rows(problem):
        known = ids[q > 0]
        expected = torch.zeros(V, dtype=torch.float64)
        gap = problem.logits()[row, known].detach() - q[q > 0].log()
        expected[known] = 2 / max(1, len(known)) * (gap - gap.mean())
        torch.testing.assert_close(grad[row], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.5, 1e-3])
def test_policy_gradient(clip: float | None) -> None:
    """A (p - e_a): the advantage has no gradient of its own."""
    problem = Problem(Objective.policy_gradient(clip))
    grad = logit_gradient(problem)
    values = problem.loss(alpha=1.0, reduction="none")
    advantages = []
    for row, p, *_ in rows(problem):
        label = problem.labels[row]
        advantage = problem.device_targets.label_logprob[row].double() - p[label].log()
        if clip is not None:
            advantage = advantage.clamp(-clip, clip)
        advantages.append(float(advantage))
        expected = advantage * p
        expected[label] -= advantage
        torch.testing.assert_close(grad[row], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(values[row], -advantage * p[label].log())
    assert min(advantages) < 0 < max(advantages)
    assert (grad[N - 1] == 0).all()


def test_blend() -> None:
    problem = Problem(Objective.forward_kl("blend"))
    problem.targets = varopt_targets(teacher_probs(V))
    grad = logit_gradient(problem, blend=0.3)
    heads = rows(problem, problem.device_targets.exact_head())
    for (row, p, ids, w, _), (_, _, head, q, tau) in zip(rows(problem), heads, strict=True):
        sampled = w.sum() * p
        sampled[ids] -= w
        bucket = (q.sum() + tau) * p
        bucket[head] -= q
        if len(head) < V and tau > 0:
            outside = torch.ones(V, dtype=torch.bool)
            outside[head] = False
            bucket[outside] -= tau * p[outside] / p[outside].sum()
        else:
            bucket -= tau * p
        torch.testing.assert_close(grad[row], 0.7 * bucket + 0.3 * sampled, rtol=1e-9, atol=1e-12)


def test_z_loss() -> None:
    """2 c lse p, whatever alpha is."""
    problem = Problem(Objective.cross_entropy())
    problem.hidden = (problem.logits() - problem.bias).detach().requires_grad_()
    problem.weight = torch.eye(V, dtype=torch.float64)
    lse_N = problem.logits().logsumexp(1).detach()
    for objective, alpha in ((None, 0.0), (Objective.forward_kl(), 1.0), (Objective.reverse_kl(), 0.4)):
        grads = []
        for z_loss in (0.0, 0.01):
            loss = problem.loss(objective=objective, alpha=alpha, reduction="sum", z_loss=z_loss)
            grads.append(torch.autograd.grad(loss, problem.hidden)[0])
        expected = 0.02 * lse_N[:, None] * torch.softmax(problem.logits(), 1).detach()
        expected[N - 1] = 0
        torch.testing.assert_close(grads[1] - grads[0], expected, rtol=1e-9, atol=1e-12)
