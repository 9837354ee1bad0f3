"""What other tools compute, written by us from their published formulas, to show where it goes wrong.

Each function names the project, version and file it stands for; `benchmarks.peer_faults` runs the projects' own code on
the same inputs. Nothing here is used by logitcache.

Legend: N rows, V vocabulary, D width, K stored ids per row (the set S); q the teacher, p the student; nats.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

EPS = 1e-8


def _log_softmax_on(ids_NK: torch.Tensor, logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits_NV.gather(1, ids_NK) / temperature).log_softmax(1)


def kl_scaled_after_the_gradient(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor, log_q_NK: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Renormalised KL whose T^2 multiplies the reported value, but not the gradients, which are ready by then.

    axolotl 0.19.0, integrations/kd/kernels/liger.py, LigerFusedLinearKLTopKLogprobFunction.forward.
    """
    log_p_NK = _log_softmax_on(ids_NK, hidden_ND @ weight_VD.T, temperature)
    heated_NK = (log_q_NK / temperature).log_softmax(1)
    unscaled = (heated_NK.exp() * (heated_NK - log_p_NK)).sum(1).mean()
    return unscaled + (temperature**2 - 1) * unscaled.detach()


def kl_with_clamped_missing_mass(
    logits_NV: torch.Tensor, ids_NK: torch.Tensor, log_q_NK: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Bucket KL whose tails are log1p(-clamp(sum, 1e-8, 1 - 1e-8)): in float32 the upper bound is 1, and its log -inf.

    At T != 1 the teacher's tail is heated as if it were one token, the student's token by token. In half precision
    the gathered logits and the logsumexp are rounded apart from each other.
    DistillKit a61c2e7 (2026-03-14), distillkit/lossfuncs/kl.py and common.py, missing=SYMMETRIC_UNIFORM.
    """
    scaled_NV = logits_NV / temperature if temperature != 1 else logits_NV
    log_z_N1 = scaled_NV.float().logsumexp(1, keepdim=True).to(logits_NV.dtype)
    log_p_NK = scaled_NV.gather(1, ids_NK) - log_z_N1
    if temperature != 1:
        left_N1 = (1 - log_q_NK.exp().sum(1, keepdim=True)).clamp(0, 1)
        mass_N1 = (log_q_NK / temperature).exp().sum(1, keepdim=True) + left_N1 ** (1 / temperature)
        log_q_NK = log_q_NK / temperature - mass_N1.log()
    q_NK = log_q_NK.to(logits_NV.dtype).exp()
    tails_N = [torch.log1p(-mass_NK.float().sum(1).clamp(EPS, 1 - EPS)) for mass_NK in (q_NK, log_p_NK.float().exp())]
    inside_N = (q_NK * (log_q_NK.to(logits_NV.dtype) - log_p_NK)).sum(1)
    return (inside_N + tails_N[0].exp() * (tails_N[0] - tails_N[1])).mean()


def kl_with_clamped_log_mass(student_NV: torch.Tensor, teacher_NV: torch.Tensor, k: int) -> torch.Tensor:
    """Bucket KL on the student's top k, tails log(-expm1(min(log mass, -1e-7))): below 1e-7 the tail has no gradient.

    TRL 1.16.0, trl/experimental/sdpo/loss_utils.py (add_tail_bucket), and the same in server_distillation,
    async_distillation and sdft.
    """
    ids_NK = student_NV.topk(k, dim=1).indices
    both = []
    for logits_NV in (teacher_NV, student_NV):
        stored_NK = logits_NV.gather(1, ids_NK) - logits_NV.logsumexp(1, keepdim=True)
        log_mass_N1 = stored_NK.logsumexp(1, keepdim=True).clamp(max=-1e-7)
        both.append(torch.cat([stored_NK, (-torch.expm1(log_mass_N1)).log()], dim=1))
    return (both[0].exp() * (both[0] - both[1])).sum(1).mean()


def kl_of_rounded_log_softmax(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, teacher_hidden_ND: torch.Tensor
) -> torch.Tensor:
    """Dense KL whose logits and log-probabilities have the type of the model.

    Liger 0.8.5, liger_kernel/chunked_loss/jsd_loss.py, beta=0. (Its Triton loss, ops/fused_linear_jsd.py, asks for
    float32 products and has no such fault.)
    """
    log_p_NV = (hidden_ND @ weight_VD.T).log_softmax(1)
    log_q_NV = (teacher_hidden_ND @ weight_VD.T).log_softmax(1)
    return (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(1).float().mean()


def kl_of_rounded_logits(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor, log_q_NK: torch.Tensor
) -> torch.Tensor:
    """KL over S of logits that have the model's type and are widened afterwards.

    axolotl 0.19.0, integrations/kd/kernels/liger.py, and whatever takes `model(...).logits` of a bf16 model.
    """
    log_p_NK = (hidden_ND @ weight_VD.T).float().log_softmax(1).gather(1, ids_NK)
    return (log_q_NK.float().exp() * (log_q_NK.float() - log_p_NK)).sum(1).mean()


def reverse_kl_with_masked_products(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """Reverse KL that fills in 0 where a logit is -inf, after the product: its derivative there is 0 * -inf.

    torchtune 0.6.1, torchtune/modules/loss/kd_losses.py, ReverseKLLoss.
    """
    p_NV, log_p_NV, log_q_NV = student_NV.softmax(1), student_NV.log_softmax(1), teacher_NV.log_softmax(1)
    masked_NV = student_NV.isinf() | teacher_NV.isinf()
    terms_NV = (p_NV * log_p_NV).masked_fill(masked_NV, 0) - (p_NV * log_q_NV).masked_fill(masked_NV, 0)
    return terms_NV.sum(1).mean()


def kl_averaged_over_elements(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """KL divided by N * V, not by N.

    ModelOpt 0.47.0, modelopt/torch/distill/losses.py, LogitsDistillationLoss() with its default reduction="mean".
    """
    elements_NV = F.kl_div(student_NV.log_softmax(1), teacher_NV.softmax(1), reduction="none")
    return elements_NV.sum() / elements_NV.numel()


def kl_with_zeros_for_missing_columns(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """A student with fewer columns than the teacher's padded head gets logits of 0 there, as if they were tokens.

    Liger 0.8.5, liger_kernel/chunked_loss/fused_linear_distillation.py, _compute_loss.
    """
    missing = teacher_NV.shape[1] - student_NV.shape[1]
    log_p_NV = F.pad(student_NV, (0, missing)).log_softmax(1)
    return F.kl_div(log_p_NV, teacher_NV.log_softmax(1), reduction="batchmean", log_target=True)
