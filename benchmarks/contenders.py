"""What is raced: plain PyTorch, other projects' kernels as installed, and ours.

A contender's `make` takes a problem and returns a function that computes its task's loss; it raises `Missing` with the
reason where it cannot run. Other projects are imported when they are made, never before, and never copied.

Legend: N rows (token positions), D width, V rows of the head, K stored ids per row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.head_problem import ALPHA, BUCKET, CE, LIVE, NO_TAIL, SCATTERED, HeadProblem
from benchmarks.peer_code import Missing, axolotl_kernel, liger_chunked, version
from logitcache.losses import Objective, distillation_loss

Job = Callable[[], torch.Tensor]
# Matrix products of a forward and backward pass. 'auto' may choose among them; 3 is the fewest there can be.
OUR_PRODUCTS = {"reference": 3, "split": 4, "chunk": 3, "triton": 4, "auto": 3}
EAGER = "eager PyTorch"
COMPILED = "torch.compile"
OBJECTIVES = {CE: Objective.cross_entropy(), BUCKET: Objective.forward_kl("bucket")}


@dataclass(frozen=True)
class Contender:
    """One implementation of one task.

    Args:
        name: as in the table.
        task: one of `head_problem.TASKS`.
        products: matrix products of forward and backward, the live teacher's included.
        make: problem -> job.
        everywhere: essential: it also runs where only few do, at further K and, on a CPU, at the large shapes.
        cuda_only: kernels that have no CPU version.
    """

    name: str
    task: str
    products: int
    make: Callable[[HeadProblem], Job]
    everywhere: bool = False
    cuda_only: bool = False


# Plain PyTorch. Logits are widened before the softmax, as transformers' loss does.


def eager_ce(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden_ND @ weight_VD.T).float(), labels_N)


def eager_sparse(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    ids_NK: torch.Tensor,
    q_NK: torch.Tensor,
    tau_N: torch.Tensor,
) -> torch.Tensor:
    """One log-softmax, one gather for the stored ids and the label."""
    log_p_NV = (hidden_ND @ weight_VD.T).float().log_softmax(1)
    log_p = log_p_NV.gather(1, torch.cat([ids_NK, labels_N[:, None]], dim=1))
    log_p_NK = log_p[:, :-1]
    log_rest_N = (-torch.expm1(log_p_NK.logsumexp(1))).log()
    kl_N = (torch.xlogy(q_NK, q_NK) - q_NK * log_p_NK).sum(1) + torch.xlogy(tau_N, tau_N) - tau_N * log_rest_N
    return ((1 - ALPHA) * -log_p[:, -1] + ALPHA * kl_N).mean()


def eager_dense(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    ids_NK: torch.Tensor,
    q_NK: torch.Tensor,
) -> torch.Tensor:
    """The teacher's rows scattered over the vocabulary, and PyTorch's own KL."""
    log_p_NV = (hidden_ND @ weight_VD.T).float().log_softmax(1)
    q_NV = torch.zeros_like(log_p_NV).scatter_(1, ids_NK, q_NK)
    kl = F.kl_div(log_p_NV, q_NV, reduction="batchmean")
    return (1 - ALPHA) * F.nll_loss(log_p_NV, labels_N) + ALPHA * kl


def eager_live(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, teacher_ND: torch.Tensor) -> torch.Tensor:
    log_p_NV = (hidden_ND @ weight_VD.T).float().log_softmax(1)
    log_q_NV = (teacher_ND @ weight_VD.detach().T).float().log_softmax(1)
    return F.kl_div(log_p_NV, log_q_NV, reduction="batchmean", log_target=True)


def _plain(function: Callable[..., torch.Tensor], task: str, compiled: bool) -> Callable[[HeadProblem], Job]:
    def make(problem: HeadProblem) -> Job:
        run = torch.compile(function, dynamic=False) if compiled else function
        targets = problem.targets
        extra: dict[str, tuple[torch.Tensor, ...]] = {
            CE: (problem.labels_N,),
            BUCKET: (problem.labels_N, targets.ids, targets.weights, targets.tail_mass),
            NO_TAIL: (problem.labels_N, targets.ids, targets.weights),
            LIVE: (problem.teacher_ND,),
        }
        return lambda: run(problem.hidden_ND, problem.weight_VD, *extra[task])

    return make


def torch_linear_ce(problem: HeadProblem) -> Job:
    """PyTorch's own chunked linear cross entropy, where this torch has it: gradient in the forward pass."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Missing(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(problem.hidden_ND, problem.weight_VD, problem.labels_N, options=options)


# Other projects


def _peer(distribution: str, module: str, name: str) -> Any:
    version(distribution)
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # Whatever a package does at import: no driver, another torch.
        raise Missing(f"{module} does not import: {type(error).__name__}: {error}".split("\n")[0]) from error


def _cut(impl: str) -> Callable[[HeadProblem], Job]:
    def make(problem: HeadProblem) -> Job:
        loss = _peer("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")
        return lambda: loss(problem.hidden_ND, problem.weight_VD, problem.labels_N, impl=impl)

    return make


def liger_ce(problem: HeadProblem) -> Job:
    loss = _peer("liger-kernel", "liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")()
    return lambda: loss(problem.weight_VD, problem.hidden_ND, problem.labels_N)


def liger_live(problem: HeadProblem) -> Job:
    """The chunked loss, which is plain torch; compiled on CUDA, as is its default."""
    on_cuda = problem.hidden_ND.is_cuda
    module = liger_chunked(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=on_cuda)
    head_VD = problem.weight_VD.detach()
    return lambda: module(problem.hidden_ND, problem.weight_VD, problem.teacher_ND, head_VD, problem.labels_N)


def liger_jsd(problem: HeadProblem) -> Job:
    """The Triton kernel; beta=0 is KL(teacher || student)."""
    loss = _peer("liger-kernel", "liger_kernel.transformers", "LigerFusedLinearJSD")(jsd_beta=0.0)
    head_VD = problem.weight_VD.detach()
    return lambda: loss(problem.hidden_ND, problem.weight_VD, problem.teacher_ND, head_VD, None)


def liger_scattered(problem: HeadProblem) -> Job:
    """The Triton kernel for a given distribution: the teacher's rows have to be scattered for it."""
    loss = _peer("liger-kernel", "liger_kernel.transformers.fused_linear_kl_div", "LigerFusedLinearKLDivLoss")()
    shape = len(problem.hidden_ND), len(problem.weight_VD)

    def run() -> torch.Tensor:
        q_NV = torch.zeros(shape, device=problem.hidden_ND.device)
        q_NV.scatter_(1, problem.targets.ids, problem.targets.weights)
        value: torch.Tensor = loss(problem.hidden_ND, problem.weight_VD, q_NV)
        return value

    return run


def axolotl_top_k(problem: HeadProblem) -> Job:
    """axolotl's chunked top-k loss. It shifts the labels itself, so that one row more carries the last of them."""
    kernel = axolotl_kernel()
    on_cuda = problem.hidden_ND.is_cuda
    module = kernel.LigerFusedLinearKLTopKLogprobLoss(
        1 - ALPHA, ALPHA, 1.0, beta=0.0, compiled=on_cuda, normalize_topk=False
    )
    ids_NK, log_q_NK = problem.targets.ids, problem.targets.weights.log()
    ids, log_q = (torch.cat([tensor, tensor[:1]])[None] for tensor in (ids_NK, log_q_NK))
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    labels = torch.cat([problem.labels_N[:1], problem.labels_N])[None]

    def run() -> torch.Tensor:
        hidden = torch.cat([problem.hidden_ND, torch.zeros_like(problem.hidden_ND[:1])])[None]
        total: torch.Tensor = module(problem.weight_VD, hidden, ids, log_q, mask, true_labels=labels)
        return total / len(problem.hidden_ND)

    return run


def quack_ce(problem: HeadProblem) -> Job:
    loss = _peer("quack-kernels", "quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda: loss(problem.hidden_ND, problem.weight_VD, problem.labels_N)


# Ours


def _ours(impl: str, task: str) -> Contender:
    def make(problem: HeadProblem) -> Job:
        targets = None if task == CE else problem.targets
        return lambda: distillation_loss(
            problem.hidden_ND, problem.weight_VD, problem.labels_N, targets, OBJECTIVES[task], ALPHA, impl=impl
        )

    return Contender(
        f"logitcache {impl}", task, OUR_PRODUCTS[impl], make, everywhere=task == BUCKET and impl in ("split", "auto")
    )


def contenders() -> list[Contender]:
    """Everything there is, in the order of the table."""
    return [
        Contender(EAGER, CE, 3, _plain(eager_ce, CE, False)),
        Contender(COMPILED, CE, 3, _plain(eager_ce, CE, True)),
        Contender("F.linear_cross_entropy, chunked", CE, 3, torch_linear_ce),
        Contender("cut-cross-entropy torch_compile", CE, 3, _cut("torch_compile")),
        Contender("cut-cross-entropy cce", CE, 4, _cut("cce"), cuda_only=True),
        Contender("Liger fused linear CE", CE, 3, liger_ce, cuda_only=True),
        Contender("quack chunked linear CE", CE, 3, quack_ce, cuda_only=True),
        *(_ours(impl, CE) for impl in OUR_PRODUCTS),
        Contender(EAGER, BUCKET, 3, _plain(eager_sparse, BUCKET, False), everywhere=True),
        Contender(COMPILED, BUCKET, 3, _plain(eager_sparse, BUCKET, True)),
        *(_ours(impl, BUCKET) for impl in OUR_PRODUCTS),
        Contender(f"{EAGER}, rows scattered", NO_TAIL, 3, _plain(eager_dense, NO_TAIL, False)),
        Contender(f"{COMPILED}, rows scattered", NO_TAIL, 3, _plain(eager_dense, NO_TAIL, True)),
        Contender("axolotl chunked top-k", NO_TAIL, 3, axolotl_top_k),
        Contender("Liger fused linear KL, rows scattered", SCATTERED, 3, liger_scattered, cuda_only=True),
        Contender(EAGER, LIVE, 4, _plain(eager_live, LIVE, False)),
        Contender("Liger chunked JSD", LIVE, 4, liger_live),
        Contender("Liger fused linear JSD", LIVE, 4, liger_jsd, cuda_only=True),
    ]
