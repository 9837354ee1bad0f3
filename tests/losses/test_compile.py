"""The closed forms under torch.compile(fullgraph=True): no look at a tensor's values, the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from logitcache.losses import Objective
from logitcache.losses.checks import check_label_logprob, check_label_values, device_targets, has_exact_head
from logitcache.losses.divergence import divergence, gather_terms, read_by
from logitcache.losses.student import Student
from logitcache.targets import DeviceTargets
from tests.losses.problems import OBJECTIVES, N, Problem, V

# Every function of the table once, by the targets it can use: other options are other numbers.
ONCE = {(pair[0].kind, pair[0].tail, pair[0].reverse): pair for pair in OBJECTIVES}
GROUPS = {
    "probabilities": [pair for pair in ONCE.values() if pair[0].tail not in ("unbiased", "blend")],
    "samples": [(Objective.forward_kl("unbiased"), 1.0)],
    "heads": [(Objective.forward_kl("blend"), 1.0), (Objective.jsd(), 1.0)],
}


def student_of(logits_NV: torch.Tensor, ids_NK: torch.Tensor, labels_N: torch.Tensor) -> Student:
    """The student's side from dense logits, without the primitive."""
    stored_NK = ids_NK >= 0
    outside_NV = torch.ones_like(logits_NV, dtype=torch.bool).scatter(1, ids_NK.clamp(min=0), False)
    outside_NV[~stored_NK.any(1)] = True
    lse_N = logits_NV.logsumexp(1)
    rest_N = logits_NV.masked_fill(~outside_NV, -1e30).logsumexp(1) - lse_N
    rest_N = torch.where(outside_NV.any(1), rest_N, -torch.inf)
    z_NK = logits_NV.gather(1, ids_NK.clamp(min=0)).masked_fill(~stored_NK, -torch.inf)
    log_p_N = (logits_NV - lse_N[:, None]).gather(1, labels_N.clamp(min=0)[:, None]).squeeze(1)
    log_p_N = torch.where(labels_N >= 0, log_p_N, 0.0)
    return Student(z_NK, lse_N, rest_N, log_p_N, (ids_NK == labels_N[:, None]) & stored_NK)


@pytest.mark.parametrize("group", GROUPS)
def test_one_graph_and_the_same_numbers(group: str) -> None:
    """On CPU tensors, where values are looked at when nothing is traced."""
    torch.compiler.reset()
    problem = Problem(GROUPS[group][0][0])
    labels = problem.labels.masked_fill(problem.labels == -100, -1)

    def losses(logits: torch.Tensor, targets: DeviceTargets, blend: torch.Tensor) -> torch.Tensor:
        check_label_values(labels, labels >= 0, V)
        whole = device_targets(targets, logits, V)
        values = []
        for objective, temperature in GROUPS[group]:
            objective.check(whole.unbiased, temperature, has_exact_head=has_exact_head(whole))
            given = read_by(objective, whole)
            check_label_logprob(given, labels >= 0)
            gathered = gather_terms(student_of(logits, given.ids, labels), given, blend)
            values.append(divergence(gathered, objective, temperature)[: N - 1].sum())
        return torch.stack(values)

    logits = problem.logits().detach().requires_grad_()
    targets = replace(problem.device_targets, has_exact_head=None)
    # Tracing is what may fail; compiling the backward pass too takes long, so the smaller groups show it.
    backend = "eager" if group == "probabilities" else "aot_eager"
    compiled = torch.compile(losses, fullgraph=True, backend=backend)
    weights = torch.linspace(1, 2, len(GROUPS[group]), dtype=torch.float64)
    for share in (0.25, 0.75):
        blend = torch.tensor(share, dtype=torch.float64)
        mine, right = compiled(logits, targets, blend), losses(logits, targets, blend)
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad((values * weights).sum(), logits)[0] for values in (mine, right)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
