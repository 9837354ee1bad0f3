"""Full knowledge distillation with the teacher in the training loop: as it is usually written, and as it should be.

Both minimise (1 - alpha) * CE + alpha * KL(teacher || student) over the whole vocabulary, the mean over all positions
that have a next token in their block. Blocks must be whole.

Legend: B blocks of L tokens, N = B * L rows, n rows of a slice, D width of the student, V rows of the head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from logitcache import models
from logitcache.teachers import TransformersTeacher

IGNORED = -100


def dense_loss(
    student: Any, teacher: TransformersTeacher, ids_BL: torch.Tensor, labels_BL: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Two transformers models, their logits [B, L, V], and PyTorch's losses of them in float32."""
    with torch.inference_mode():
        log_q_BLV = F.log_softmax(teacher.model(input_ids=ids_BL).logits[:, :-1].float(), dim=-1)
    log_p_BLV = F.log_softmax(student(input_ids=ids_BL).logits[:, :-1].float(), dim=-1)
    ce = F.nll_loss(log_p_BLV.flatten(0, 1), labels_BL[:, :-1].flatten())
    kl = F.kl_div(log_p_BLV.flatten(0, 1), log_q_BLV.flatten(0, 1), reduction="batchmean", log_target=True)
    return (1 - alpha) * ce + alpha * kl


def sliced_loss(
    student: Any, teacher: TransformersTeacher, ids_BL: torch.Tensor, labels_BL: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Both heads a slice of rows at a time, the gradient made while the slice's logits exist: no [B, L, V].

    As few matrix products as there can be: three of the student's head, one of the teacher's. The student's head must
    be a bare linear layer.
    """
    _, head = models.split_model(student)
    assert (head.bias, head.softcap, head.logit_scale) == (None, None, None)
    hidden_ND = models.body_hidden(student, ids_BL).flatten(0, 1)
    with torch.inference_mode():
        states_ND = models.body_hidden(teacher.model, ids_BL).flatten(0, 1)
    loss: torch.Tensor = _Sliced.apply(hidden_ND, head.weight, labels_BL.flatten(), teacher, states_ND, alpha)
    return loss


class _Sliced(torch.autograd.Function):
    """The loss of hidden states and head, together with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        teacher: TransformersTeacher,
        states_ND: torch.Tensor,
        alpha: float,
    ) -> torch.Tensor:
        operand = _operand_type(hidden_ND)
        narrow_ND, narrow_VD = hidden_ND.to(operand), weight_VD.to(operand)
        dhidden_ND = torch.empty_like(narrow_ND)
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        share_N = (labels_N != IGNORED) / (labels_N != IGNORED).sum()
        loss = share_N.new_zeros(())
        for rows in teacher.row_slices(len(hidden_ND)):
            share_n1, index_n1 = share_N[rows, None], labels_N[rows, None].clamp(min=0)
            log_q_nV = teacher.logits(states_ND[rows]).log_softmax(1)
            log_p_nV = (narrow_ND[rows] @ narrow_VD.T).float().log_softmax(1)
            q_nV = log_q_nV.exp()
            kl_n1 = log_q_nV.sub_(log_p_nV).mul_(q_nV).sum(1, keepdim=True)
            ce_n1 = -log_p_nV.gather(1, index_n1)
            loss += (share_n1 * torch.lerp(ce_n1, kl_n1, alpha)).sum()
            grad_nV = log_p_nV.exp_().sub_(q_nV, alpha=alpha)
            grad_nV.scatter_add_(1, index_n1, torch.full_like(ce_n1, alpha - 1)).mul_(share_n1)
            grad_nV = grad_nV.to(operand)
            torch.mm(grad_nV, narrow_VD, out=dhidden_ND[rows])
            if operand == torch.float32:
                dweight_VD.addmm_(grad_nV.T, narrow_ND[rows])
            else:
                dweight_VD += grad_nV.T @ narrow_ND[rows]
        ctx.gradients = dhidden_ND.to(hidden_ND.dtype), dweight_VD.to(weight_VD.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.gradients
        ctx.gradients = None
        return dhidden_ND.mul_(grad), dweight_VD.mul_(grad), None, None, None, None


def _operand_type(hidden_ND: torch.Tensor) -> torch.dtype:
    """What matrix products are made in: autocast's type where it is on."""
    device = hidden_ND.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
