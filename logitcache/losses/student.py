"""The student's side of a loss: the ids that the primitive gathers, the label among them, and what follows from it.

Legend: N rows (token positions), K stored ids per row (the set S), +1 the label's column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from logitcache.kernels import GatherResult


@dataclass(frozen=True, eq=False)
class Student:
    """The pieces of the student's softmax, in the working type, natural logarithms.

    Args:
        z_NK: logits at the stored ids, -inf at padding.
        lse_N: logsumexp over the whole (valid) vocabulary.
        log_rest_N: log of the mass outside S (a label outside S is part of it); -inf when S is the vocabulary.
        log_p_label_N: log p of the label, 0 where there is none; None if the labels were not read.
        label_NK: bool, the column of the stored ids that holds the label; None if the labels were not read.
    """

    z_NK: torch.Tensor
    lse_N: torch.Tensor
    log_rest_N: torch.Tensor
    log_p_label_N: torch.Tensor | None
    label_NK: torch.Tensor | None


def working_dtype(device: torch.device) -> torch.dtype:
    """float64, except on Apple's GPUs, which have none.

    K is small, so float64 costs nothing here, and differences such as p - q keep their digits when the student is
    confident or close to the teacher.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def ids_to_gather(ids_NK: torch.Tensor, label_N: torch.Tensor | None) -> torch.Tensor:
    """The stored ids [N, K] and, in one more column, the label of each row that has one outside them, else -1.

    `label_N` holds -1 where a row has no label; None leaves labels out altogether. A label that is stored already uses
    its own column, so that the ids stay unique.
    """
    if label_N is None:
        return ids_NK
    stored_N = _label_column(ids_NK, label_N).any(dim=1)
    return torch.cat([ids_NK, label_N.masked_fill(stored_N, -1)[:, None]], dim=1)


def student_of(result: GatherResult, ids_NK: torch.Tensor, label_N: torch.Tensor | None) -> Student:
    """The student's side from the primitive's results at `ids_to_gather(ids_NK, label_N)`."""
    z, rest_N, lse_N = _widen(result)
    if label_N is None:
        return Student(z, lse_N, rest_N - lse_N, None, None)
    label_NK = _label_column(ids_NK, label_N)
    outside_N = (label_N >= 0) & ~label_NK.any(dim=1)
    # Rows without the extra column put 0 in its place: -inf with -inf would have a NaN gradient.
    z_NK, z_extra_N = z[:, :-1], torch.where(outside_N, z[:, -1], 0.0)
    log_rest_N = torch.where(outside_N, torch.logaddexp(rest_N, z_extra_N), rest_N) - lse_N
    z_label_N = torch.where(label_NK, z_NK, 0.0).sum(dim=1) + z_extra_N
    log_p_label_N = torch.where(label_N >= 0, z_label_N - lse_N, 0.0)
    return Student(z_NK, lse_N, log_rest_N, log_p_label_N, label_NK)


def _label_column(ids_NK: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    return (ids_NK == label_N[:, None]) & (label_N >= 0)[:, None]


def _widen(result: GatherResult) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z, lse_rest and the full logsumexp in the working type."""
    dtype = working_dtype(result.z.device)
    z, rest_N = result.z.to(dtype), result.lse_rest.to(dtype)
    # The rest or a gathered id is always finite, so no row is all -inf (whose gradient would be NaN).
    return z, rest_N, torch.logsumexp(torch.cat([rest_N[:, None], z], dim=1), dim=1)
