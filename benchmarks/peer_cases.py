"""Inputs on which other tools' losses go wrong, and one figure for each: how wrong, where 0 is right.

A case measures any loss of its signature: the formula of `peer_formulas`, the peer's own code (`peer_code`) or ours.
Legend: N rows, V vocabulary, D width, K stored ids per row (the set S); q the teacher, p the student; nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import peer_formulas as formulas
from logitcache.losses import Objective, distillation_loss
from logitcache.targets import DeviceTargets

Loss = Callable[..., torch.Tensor]
BUCKET, RENORMALISED = Objective.forward_kl("bucket"), Objective.forward_kl("renormalised")


@dataclass(frozen=True)
class Case:
    """One way to be wrong.

    Args:
        name: key of the case, also in `peer_code.PEERS`.
        peer: project and version whose formula it is.
        what: what goes wrong.
        when: the inputs.
        figure: what the number is; 0 is right.
        percent: whether it prints as a percentage.
        measure: loss -> figure; NaN or inf are figures too.
        formula, ours: losses that `measure` takes.
        tolerance: ours stays below it; theirs exceeds it tenfold.
    """

    name: str
    peer: str
    what: str
    when: str
    figure: str
    percent: bool
    measure: Callable[[Loss], float]
    formula: Loss
    ours: Loss
    tolerance: float

    def print(self, value: float) -> str:
        """The figure as the table shows it."""
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "inf"
        return f"{100 * value:.3g} %" if self.percent else f"{value:.2g}"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _targets(ids_NK: torch.Tensor, weights_NK: torch.Tensor, tail_N: torch.Tensor) -> DeviceTargets:
    """Targets in any order of ids, as the kernels want them."""
    ids_NK, order_NK = ids_NK.sort(dim=1)
    unknown_N = torch.full_like(tail_N, math.nan, dtype=torch.float32)
    weights_NK = weights_NK.gather(1, order_NK).float()
    return DeviceTargets(ids_NK, weights_NK, tail_N.float(), unknown_N, unknown_N, torch.zeros_like(unknown_N), False)


def _ours(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets: DeviceTargets, **options: Any) -> torch.Tensor:
    """The divergence alone, a mean over the rows."""
    labels_N = torch.zeros(len(hidden_ND), dtype=torch.int64)
    return distillation_loss(hidden_ND, weight_VD, labels_N, targets, alpha=1.0, **options)


def _ours_on_logits(logits_NV: torch.Tensor, targets: DeviceTargets, **options: Any) -> torch.Tensor:
    """Ours for a peer that starts from logits: hidden states that are the logits, and the identity as the head."""
    return _ours(logits_NV, torch.eye(logits_NV.shape[1], dtype=logits_NV.dtype), targets, **options)


def _gradient(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, leaf)[0].double()


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _exact_bucket(
    logits_NV: torch.Tensor, ids_NK: torch.Tensor, log_q_NK: torch.Tensor, log_tau_N: torch.Tensor
) -> Any:
    """Bucket KL in float64, the student's tail as a sum over the other tokens."""
    log_p_NV = logits_NV.double().log_softmax(1)
    rest_N = log_p_NV.scatter(1, ids_NK, -math.inf).logsumexp(1)
    stored_N = (log_q_NK.exp() * (log_q_NK - log_p_NV.gather(1, ids_NK))).sum(1)
    return (stored_N + log_tau_N.exp() * (log_tau_N - rest_N)).mean()


def _teacher_tail(teacher_NV: torch.Tensor, ids_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log q on S and log tau, both in float64."""
    log_q_NV = teacher_NV.double().log_softmax(1)
    return log_q_NV.gather(1, ids_NK), log_q_NV.scatter(1, ids_NK, -math.inf).logsumexp(1)


# T^2 on the value and not on the gradient


def _slope(loss: Loss) -> float:
    """|gradient / slope of the reported loss - 1|, along the gradient."""
    g = _generator(0)
    hidden_ND, weight_VD = torch.randn(16, 8, generator=g), torch.randn(64, 8, generator=g)
    ids_NK = torch.stack([torch.randperm(64, generator=g)[:8] for _ in range(16)])
    log_q_NK = torch.randn(16, 8, generator=g).log_softmax(1) - 0.1
    hidden_ND, weight_VD, log_q_NK = hidden_ND.double(), weight_VD.double(), log_q_NK.double()

    def value(hidden: torch.Tensor) -> torch.Tensor:
        return loss(hidden, weight_VD, ids_NK, log_q_NK, 2.0)

    leaf = hidden_ND.clone().requires_grad_()
    gradient_ND = _gradient(value(leaf), leaf)
    direction_ND = gradient_ND / gradient_ND.norm()
    step = 1e-2
    slope = (value(hidden_ND + step * direction_ND) - value(hidden_ND - step * direction_ND)) / (2 * step)
    return abs(float(gradient_ND.norm() / slope) - 1)


def _ours_heated(hidden: Any, weight: Any, ids: Any, log_q: Any, temperature: float) -> torch.Tensor:
    tail_N = 1 - log_q.exp().sum(1)
    return _ours(hidden, weight, _targets(ids, log_q.exp(), tail_N), objective=RENORMALISED, temperature=temperature)


# Tails

STORED = torch.tensor([[0, 1, 2, 3]])


def _tail_error(student: list[float], teacher: list[float]) -> Callable[[Loss], float]:
    """Error of the value, in nats, of one row of 32 float32 logits; tokens past the four stored ones share the last."""

    def measure(loss: Loss) -> float:
        rows = [torch.tensor([row[:4] + row[4:] * 28]) for row in (student, teacher)]
        log_q_NK, log_tau_N = _teacher_tail(rows[1], STORED)
        leaf = rows[0].clone().requires_grad_()
        value = loss(leaf, STORED, log_q_NK.float())
        gradient = _gradient(value, leaf)
        if not bool(gradient.isfinite().all()) and bool(value.isfinite()):
            return math.nan
        return abs(float(value.detach()) - float(_exact_bucket(rows[0], STORED, log_q_NK, log_tau_N)))

    return measure


def _ours_bucket(logits: Any, ids: Any, log_q: Any) -> torch.Tensor:
    tail_N = -torch.expm1(log_q.double().logsumexp(1)).clamp(max=0)
    return _ours_on_logits(logits, _targets(ids, log_q.exp(), tail_N), objective=BUCKET)


def _lost_tail(gap: float) -> Callable[[Loss], float]:
    """Error of the gradient for a student whose mass outside its top 4 is about 28 exp(-gap); the teacher's is 0.2."""

    def measure(loss: Loss) -> float:
        g = _generator(1)
        student_NV = torch.randn(8, 32, generator=g) * 0.3
        student_NV[:, :4] += gap
        teacher_NV = torch.randn(8, 32, generator=g)
        teacher_NV[:, :4] += 3.5
        log_q_NK, log_tau_N = _teacher_tail(teacher_NV, STORED.expand(8, -1))
        exact = student_NV.clone().requires_grad_()
        exact_NV = _gradient(_exact_bucket(exact, STORED.expand(8, -1), log_q_NK, log_tau_N), exact)
        leaf = student_NV.clone().requires_grad_()
        return _relative(_gradient(loss(leaf, teacher_NV, 4), leaf), exact_NV)

    return measure


def _ours_top(student: Any, teacher: Any, k: int) -> torch.Tensor:
    ids_NK = student.detach().topk(k, dim=1).indices
    log_q_NK, log_tau_N = _teacher_tail(teacher, ids_NK)
    return _ours_on_logits(student, _targets(ids_NK, log_q_NK.exp(), log_tau_N.exp()), objective=BUCKET)


def _at_the_teacher(loss: Loss) -> float:
    """The loss of a student that is the teacher, at T = 2: it should be 0."""
    logits_NV = torch.randn(8, 2000, generator=_generator(2)) * 4
    ids_NK = logits_NV.topk(16, dim=1).indices
    log_q_NK, _ = _teacher_tail(logits_NV, ids_NK)
    return abs(float(loss(logits_NV, ids_NK, log_q_NK.float(), 2.0)))


def _ours_renormalised(logits: Any, ids: Any, log_q: Any, temperature: float) -> torch.Tensor:
    tail_N = 1 - log_q.exp().sum(1)
    return _ours_on_logits(logits, _targets(ids, log_q.exp(), tail_N), objective=RENORMALISED, temperature=temperature)


# Half precision

# Noise on the teacher's hidden states, and the student's mean KL that it makes.
CLOSE, CLOSE_KL = 0.02, 0.0022
HALF_WAY, HALF_WAY_KL = 0.1, 0.055


def near_teacher(noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of a student, a head and the teacher's hidden states, all bfloat16."""
    g = _generator(3)
    teacher_ND = torch.randn(128, 64, generator=g)
    weight_VD = torch.randn(1000, 64, generator=g) * 4 / 8
    hidden_ND = teacher_ND + noise * torch.randn(128, 64, generator=g)
    return hidden_ND.bfloat16(), weight_VD.bfloat16(), teacher_ND.bfloat16()


def _half_precision(sparse: bool) -> Callable[[Loss], float]:
    """Error of the hidden states' gradient against float64 on the same bfloat16 inputs, close to the teacher."""

    def measure(loss: Loss) -> float:
        hidden_ND, weight_VD, teacher_ND = near_teacher(CLOSE)
        log_q_NV = (teacher_ND.double() @ weight_VD.double().T).log_softmax(1)
        exact = hidden_ND.double().requires_grad_()
        log_p_NV = (exact @ weight_VD.double().T).log_softmax(1)
        exact_ND = _gradient((log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(1).mean(), exact)
        leaf, weight_VD = hidden_ND.clone().requires_grad_(), weight_VD.requires_grad_()
        every_NV = torch.arange(1000).expand(128, -1)
        value = loss(leaf, weight_VD, every_NV, log_q_NV) if sparse else loss(leaf, weight_VD, teacher_ND)
        return _relative(_gradient(value, leaf), exact_ND)

    return measure


def _ours_everything(hidden: Any, weight: Any, ids: Any, log_q: Any) -> torch.Tensor:
    return _ours(hidden, weight, _targets(ids, log_q.exp(), torch.zeros(len(ids))), objective=BUCKET)


def _ours_dense(hidden: Any, weight: Any, teacher_hidden: Any) -> torch.Tensor:
    log_q_NV = (teacher_hidden.double() @ weight.detach().double().T).log_softmax(1)
    return _ours_everything(hidden, weight, torch.arange(len(weight)).expand(len(hidden), -1), log_q_NV)


def _rounded_apart(loss: Loss) -> float:
    """Error of the logits' gradient against float64 on the same bfloat16 logits of a half-trained student."""
    hidden_ND, weight_VD, teacher_ND = near_teacher(HALF_WAY)
    logits_NV = hidden_ND @ weight_VD.T
    teacher_NV = teacher_ND.double() @ weight_VD.double().T
    ids_NK = teacher_NV.topk(64, dim=1).indices
    log_q_NK, log_tau_N = _teacher_tail(teacher_NV, ids_NK)
    exact = logits_NV.double().requires_grad_()
    exact_NV = _gradient(_exact_bucket(exact, ids_NK, log_q_NK, log_tau_N), exact)
    leaf = logits_NV.clone().requires_grad_()
    return _relative(_gradient(loss(leaf, ids_NK, log_q_NK.float()), leaf), exact_NV)


# Vocabularies


def _masked_vocabulary(loss: Loss) -> float:
    """Share of the student's gradient that is not finite when the teacher's padded columns are masked with -inf."""
    g = _generator(4)
    student_NV, teacher_NV = torch.randn(4, 64, generator=g), torch.randn(4, 64, generator=g)
    teacher_NV[:, 60:] = -math.inf
    leaf = student_NV.requires_grad_()
    return float((~_gradient(loss(leaf, teacher_NV), leaf).isfinite()).double().mean())


def _ours_valid(student: Any, teacher: Any) -> torch.Tensor:
    ids_NK = teacher.topk(16, dim=1).indices
    log_q_NK, log_tau_N = _teacher_tail(teacher, ids_NK)
    objective = Objective.reverse_kl() if hasattr(Objective, "reverse_kl") else BUCKET
    targets = _targets(ids_NK, log_q_NK.exp(), log_tau_N.exp())
    return _ours_on_logits(student, targets, objective=objective, valid_vocab=60)


def _value_error(loss: Loss) -> float:
    """Relative error of the mean KL of a row."""
    g = _generator(5)
    student_NV, teacher_NV = torch.randn(16, 1000, generator=g), torch.randn(16, 1000, generator=g)
    log_p_NV, log_q_NV = student_NV.double().log_softmax(1), teacher_NV.double().log_softmax(1)
    exact = float((log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(1).mean())
    return abs(float(loss(student_NV, teacher_NV)) / exact - 1)


def _ours_on_all(student: Any, teacher: Any) -> torch.Tensor:
    every_NV = torch.arange(teacher.shape[1]).expand(len(teacher), -1)
    weights_NV = teacher.double().softmax(1)
    return _ours_on_logits(student, _targets(every_NV, weights_NV, torch.zeros(len(teacher))), objective=BUCKET)


def _shift(loss: Loss) -> float:
    """Nats by which the loss moves when every logit of the student moves by -10, which changes no probability."""
    g = _generator(6)
    teacher_NV = torch.randn(16, 1064, generator=g) * 2
    teacher_NV[:, 1000:] = -20
    student_NV = teacher_NV[:, :1000] + 0.3 * torch.randn(16, 1000, generator=g)
    return abs(float(loss(student_NV - 10, teacher_NV)) - float(loss(student_NV, teacher_NV)))


def _ours_shared(student: Any, teacher: Any) -> torch.Tensor:
    return _ours_on_all(student, teacher[:, : student.shape[1]])


_DISTILLKIT = "DistillKit a61c2e7"
_CLAMPED = formulas.kl_with_clamped_missing_mass
CONFIDENT, PLAIN = [40.0, 2.0, 1.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0, 0.0]

CASES = (
    Case(
        "axolotl-t2", "axolotl 0.19.0", "T^2 multiplies the loss, not its gradient", "T = 2",
        "gradient / slope of the loss - 1", True, _slope, formulas.kl_scaled_after_the_gradient, _ours_heated, 1e-3,
    ),
    Case(
        "distillkit-teacher", _DISTILLKIT, "NaN for a confident teacher: 0 * -inf",
        "1 - q(top) < 1e-15", "error of the loss, nats", False, _tail_error(PLAIN, CONFIDENT), _CLAMPED,
        _ours_bucket, 1e-5,
    ),
    Case(
        "distillkit-student", _DISTILLKIT, "clamp(max=1 - 1e-8) is 1 in float32: infinite loss for a confident student",
        "P = 1e-16, tau = 0.47", "error of the loss, nats", False, _tail_error(CONFIDENT, PLAIN), _CLAMPED,
        _ours_bucket, 1e-5,
    ),
    Case(
        "distillkit-heated", _DISTILLKIT, "the teacher's tail is heated as one token: a loss where there is none",
        "T = 2, student = teacher", "loss, nats", False, _at_the_teacher, _CLAMPED, _ours_renormalised, 1e-6,
    ),
    Case(
        "distillkit-bf16", _DISTILLKIT, "logsumexp and gathered logits rounded apart, gradients added in bf16",
        f"bf16 logits, K = 64, KL = {HALF_WAY_KL}", "error of the logits' gradient", True, _rounded_apart, _CLAMPED,
        _ours_bucket, 4e-3,
    ),
    Case(
        "trl-clamp", "TRL 1.16.0", "clamp(log mass, max=-1e-7) cuts the tail's gradient", "P = 3e-10, tau = 0.2",
        "error of the gradient", True, _lost_tail(24.0), formulas.kl_with_clamped_log_mass, _ours_top, 1e-5,
    ),
    Case(
        "trl-rounding", "TRL 1.16.0", "1 - mass in float32: the tail is rounding error", "P = 5e-7, tau = 0.2",
        "error of the gradient", True, _lost_tail(16.5), formulas.kl_with_clamped_log_mass, _ours_top, 1e-5,
    ),
    Case(
        "liger-bf16", "Liger 0.8.5 (chunked loss)", "log-softmax in bf16, student close to the teacher",
        f"bf16, KL = {CLOSE_KL}", "error of the hidden states' gradient", True, _half_precision(False),
        formulas.kl_of_rounded_log_softmax, _ours_dense, 4e-3,
    ),
    Case(
        "axolotl-bf16", "axolotl 0.19.0", "logits rounded to bf16, student close to the teacher",
        f"bf16, KL = {CLOSE_KL}", "error of the hidden states' gradient", True, _half_precision(True),
        formulas.kl_of_rounded_logits, _ours_everything, 4e-3,
    ),
    Case(
        "torchtune-inf", "torchtune 0.6.1", "NaN gradients where the teacher's padding is -inf (reverse KL)",
        "4 of 64 columns padded", "share of the gradient that is NaN", True, _masked_vocabulary,
        formulas.reverse_kl_with_masked_products, _ours_valid, 1e-9,
    ),
    Case(
        "modelopt-mean", "ModelOpt 0.47.0", "mean over tokens times vocabulary by default: V times too small",
        "V = 1,000", "error of the loss", True, _value_error, formulas.kl_averaged_over_elements, _ours_on_all, 1e-5,
    ),
    Case(
        "liger-padding", "Liger 0.8.5 (chunked loss)", "a student with fewer columns gets tokens of logit 0",
        "64 of 1,064 columns missing", "change under a shift of all logits, nats", False, _shift,
        formulas.kl_with_zeros_for_missing_columns, _ours_shared, 1e-5,
    ),
)  # fmt: skip
