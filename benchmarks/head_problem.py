"""A student's last hidden states, its head and a teacher's targets, and the exact gradients of every task on them.

Logits have a standard deviation of 4, so that a row's entropy is near 3 nats, as with real models. The teacher's hidden
states are the student's before noise was added; its top-k rows come from its own softmax.

Legend: N rows (token positions), D width, V rows of the head, W columns of a slice, K stored ids per row (the set S).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from logitcache.targets import DeviceTargets

ALPHA = 0.5
NOISE, LOGIT_DEVIATION = 0.3, 4.0
CHUNK, SLICE = 256, 16_384

# Tasks. Where two terms are mixed, each has weight 1/2; all are means over the rows.
CE = "CE"
BUCKET = "CE + KL, bucket"
NO_TAIL = "CE + KL, no tail"
SCATTERED = "KL, no tail"
LIVE = "KL, live teacher"
TASKS = (CE, BUCKET, NO_TAIL, SCATTERED, LIVE)
NEEDS_K = (BUCKET, NO_TAIL, SCATTERED)


@dataclass(frozen=True)
class Shape:
    """Rows of the head, its width, and rows of the batch."""

    v: int
    d: int
    n: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From 'V,D,N'."""
        v, d, n = (int(part) for part in text.split(","))
        return cls(v, d, n)

    def __str__(self) -> str:
        return f"V {self.v:,}, D {self.d:,}, N {self.n:,}"


@dataclass(frozen=True, eq=False)
class HeadProblem:
    """hidden_ND and weight_VD are leaves; teacher_ND are the teacher's hidden states, whose head is the same weight."""

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    teacher_ND: torch.Tensor
    labels_N: torch.Tensor
    targets: DeviceTargets

    def with_k(self, k: int) -> HeadProblem:
        """The same problem with the k most likely of the stored ids."""
        ids_NK = self.targets.ids
        kept_NK, place_NK = self.targets.weights.topk(min(k, ids_NK.shape[1]), dim=1)
        return replace(self, targets=top_k_targets(ids_NK.gather(1, place_NK), kept_NK))

    def forget_gradients(self) -> None:
        """Free the gradients of the last run."""
        self.hidden_ND.grad = self.weight_VD.grad = None


def top_k_targets(ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> DeviceTargets:
    """Targets from ids in any order and their probabilities."""
    ids_NK, order_NK = ids_NK.sort(dim=1)
    tail_N = (1 - weights_NK.double().sum(1)).clamp(min=0).float()
    unknown_N = torch.full_like(tail_N, math.nan)
    weights_NK = weights_NK.gather(1, order_NK).float()
    return DeviceTargets(ids_NK, weights_NK, tail_N, unknown_N, unknown_N, torch.zeros_like(tail_N), False)


def make_problem(shape: Shape, k: int, dtype: torch.dtype, device: str, seed: int = 0) -> HeadProblem:
    """Random states and head, targets of `k` ids, labels drawn from the teacher."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g, device=device)

    weight_VD = normal(shape.v, shape.d).mul_(LOGIT_DEVIATION / shape.d**0.5).to(dtype)
    teacher_ND = normal(shape.n, shape.d)
    hidden_ND = (teacher_ND + NOISE * normal(shape.n, shape.d)).to(dtype)
    teacher_ND = teacher_ND.to(dtype)
    ids, weights, labels = [], [], []
    for rows in _chunks(shape.n):
        p_NV = (teacher_ND[rows].float() @ weight_VD.float().T).softmax(1)
        top = p_NV.topk(k, dim=1)
        ids.append(top.indices)
        weights.append(top.values)
        labels.append(p_NV.multinomial(1, generator=g)[:, 0])
    return HeadProblem(
        hidden_ND.requires_grad_(),
        weight_VD.requires_grad_(),
        teacher_ND,
        torch.cat(labels),
        top_k_targets(torch.cat(ids), torch.cat(weights)),
    )


def _chunks(total: int, width: int = CHUNK) -> Iterator[slice]:
    return (slice(start, min(start + width, total)) for start in range(0, total, width))


@dataclass(frozen=True, eq=False)
class Exact:
    """A task's loss and gradients in float64 on the problem's own (rounded) inputs. The weight's is made in slices."""

    loss: float
    dlogits_NV: torch.Tensor
    dhidden_ND: torch.Tensor

    def errors(self, problem: HeadProblem) -> tuple[float, float]:
        """Relative Frobenius errors of the gradients that lie in the problem's leaves: hidden states, weight."""
        found_ND, found_VD = problem.hidden_ND.grad, problem.weight_VD.grad
        assert found_ND is not None
        assert found_VD is not None
        off = size = 0.0
        hidden_ND = problem.hidden_ND.detach().double()
        for part in _chunks(len(found_VD), SLICE):
            exact_WD = self.dlogits_NV[:, part].T @ hidden_ND
            off += float((found_VD[part].double() - exact_WD).square().sum())
            size += float(exact_WD.square().sum())
        of_hidden = (found_ND.double() - self.dhidden_ND).norm() / self.dhidden_ND.norm()
        return float(of_hidden), math.sqrt(off / size)


def exact(problem: HeadProblem, task: str) -> Exact:
    """Autograd through the task's definition in float64, a few rows of logits at a time."""
    weight_VD = problem.weight_VD.detach()
    rows_total = len(problem.hidden_ND)
    total, dlogits, dhidden = 0.0, [], []
    for rows in _chunks(rows_total):
        logits_NV = _logits(problem.hidden_ND.detach()[rows], weight_VD).requires_grad_()
        teacher_NV = _logits(problem.teacher_ND[rows], weight_VD) if task == LIVE else None
        loss = task_rows(task, logits_NV, problem, rows, teacher_NV).sum() / rows_total
        (gradient_NV,) = torch.autograd.grad(loss, logits_NV)
        parts = [gradient_NV[:, part] @ weight_VD[part].double() for part in _chunks(len(weight_VD), SLICE)]
        total += float(loss.detach())
        dlogits.append(gradient_NV)
        dhidden.append(torch.stack(parts).sum(0))
    return Exact(total, torch.cat(dlogits), torch.cat(dhidden))


def _logits(states_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    parts = [states_ND.double() @ weight_VD[part].double().T for part in _chunks(len(weight_VD), SLICE)]
    return torch.cat(parts, dim=1)


def task_rows(
    task: str, logits_NV: torch.Tensor, problem: HeadProblem, rows: slice, teacher_NV: torch.Tensor | None = None
) -> torch.Tensor:
    """[n] the task's loss of each row, as its definition reads."""
    log_p_NV = logits_NV.log_softmax(1)
    if task == LIVE:
        assert teacher_NV is not None
        return F.kl_div(log_p_NV, teacher_NV.log_softmax(1), reduction="none", log_target=True).sum(1)
    ce_N = -log_p_NV.gather(1, problem.labels_N[rows, None])[:, 0]
    if task == CE:
        return ce_N
    ids_NK, q_NK = problem.targets.ids[rows], problem.targets.weights[rows].to(log_p_NV.dtype)
    kl_N = (torch.xlogy(q_NK, q_NK) - q_NK * log_p_NV.gather(1, ids_NK)).sum(1)
    if task == SCATTERED:
        return kl_N
    if task == BUCKET:
        tau_N = problem.targets.tail_mass[rows].to(log_p_NV.dtype)
        log_rest_N = log_p_NV.scatter(1, ids_NK, -math.inf).logsumexp(1)
        kl_N = kl_N + torch.xlogy(tau_N, tau_N) - tau_N * log_rest_N
    return (1 - ALPHA) * ce_N + ALPHA * kl_N
