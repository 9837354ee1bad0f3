"""Checks of what a user hands to the losses. Values are read on CPU only: on a GPU that would stall it.

Legend: N rows (token positions), K stored ids per row.
"""

from __future__ import annotations

import math

import torch

from logitcache.errors import ObjectiveError, TargetsError
from logitcache.targets import COLUMNS, SUM_TOLERANCE, DeviceTargets, SparseTargets


def values_are_free(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values may be looked at: on CPU, and not while torch.compile traces."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_labels(labels: torch.Tensor, hidden_ND: torch.Tensor) -> None:
    """Raise ObjectiveError unless labels is int64 [N] on hidden's device."""
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        found = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ObjectiveError(f"labels is {found}; it must be an int64 tensor")
    if labels.shape != hidden_ND.shape[:1]:
        raise ObjectiveError(f"labels has shape {tuple(labels.shape)}, but hidden has {hidden_ND.shape[0]} rows")
    if labels.device != hidden_ND.device:
        raise ObjectiveError(f"labels is on {labels.device}, but hidden is on {hidden_ND.device}; move one of them")


def check_label_values(labels_N: torch.Tensor, counted_N: torch.Tensor, columns: int) -> None:
    """Raise ObjectiveError if a counted label is not a token of the head."""
    if not values_are_free(labels_N):
        return
    bad_N = counted_N & ((labels_N < 0) | (labels_N >= columns))
    if bool(bad_N.any()):
        row = int(bad_N.nonzero()[0])
        raise ObjectiveError(
            f"labels holds {int(labels_N[row])} in row {row}, but the head has {columns} valid columns; use "
            "ignore_index for rows that do not count"
        )


def device_targets(
    targets: SparseTargets | DeviceTargets | None, hidden_ND: torch.Tensor, columns: int
) -> DeviceTargets:
    """The targets as padded tensors on hidden's device, checked against the batch and the head."""
    if targets is None:
        raise ObjectiveError(
            "targets is None, but the objective reads them; pass targets, or Objective.cross_entropy()"
        )
    if not isinstance(targets, SparseTargets | DeviceTargets):
        raise TargetsError(f"targets is a {type(targets).__name__}; pass SparseTargets or DeviceTargets")
    if len(targets) != hidden_ND.shape[0]:
        raise TargetsError(f"targets has {len(targets)} rows, but hidden has {hidden_ND.shape[0]}")
    if isinstance(targets, SparseTargets):
        targets.check_vocabulary(columns)
        return targets.to_device(hidden_ND.device)
    _check_tensors(targets, hidden_ND)
    if values_are_free(hidden_ND):
        _check_values(targets, columns)
    return targets


def has_exact_head(targets: DeviceTargets) -> bool:
    """Whether the rows say which weights are exact. Where that takes a look at a GPU's values, it is believed."""
    if not targets.unbiased:
        return True
    if targets.has_exact_head is not None:
        return targets.has_exact_head
    if not values_are_free(targets.ids):
        return True
    return not bool((targets.threshold.isinf() & (targets.ids >= 0).any(1)).any())


def check_label_logprob(targets: DeviceTargets, counted_N: torch.Tensor) -> None:
    """Raise TargetsError, naming the row, if the teacher's log-probability of a counted label is not known."""
    if not values_are_free(counted_N):
        return
    bad_N = counted_N & ~torch.isfinite(targets.label_logprob)
    if bool(bad_N.any()):
        row = int(bad_N.nonzero()[0])
        raise TargetsError(
            f"targets.label_logprob is {float(targets.label_logprob[row])} in row {row}, whose label counts; "
            "policy_gradient needs it, so use a cache that `dump` wrote, or ignore_index for such rows"
        )


def known_entropy(targets: SparseTargets | DeviceTargets, counted_N: torch.Tensor, look: bool) -> torch.Tensor:
    """The teacher's entropy of each row on the device of `counted_N`, [N] nats.

    Raises:
        TargetsError: it is of another number of rows; or, where values may be looked at, it is not known of a row
            that counts.
    """
    entropy_N = torch.as_tensor(targets.entropy).to(counted_N.device)
    if entropy_N.shape != counted_N.shape:
        raise TargetsError(f"targets.entropy has shape {tuple(entropy_N.shape)}, but hidden has {len(counted_N)} rows")
    if look:
        bad_N = counted_N & ~torch.isfinite(entropy_N)
        if bool(bad_N.any()):
            row = int(bad_N.nonzero()[0])
            raise TargetsError(
                f"targets.entropy is {float(entropy_N[row])} in row {row}, whose label counts; a mask by "
                "teacher-entropy needs it, so use a cache that knows it, or a mask by student-entropy"
            )
    return entropy_N


def check_share(name: str, value: float | torch.Tensor, rows: int | None = None) -> None:
    """Raise ObjectiveError unless the value is a number in [0, 1], or a tensor of one number or one per row.

    With rows None the number of rows is not known yet.
    """
    if isinstance(value, torch.Tensor):
        if value.ndim > 1 or (value.ndim == 1 and rows is not None and len(value) != rows):
            raise ObjectiveError(f"{name} has shape {tuple(value.shape)}; it must be a number or one per row")
        if values_are_free(value) and not bool(((value >= 0) & (value <= 1)).all()):
            raise ObjectiveError(f"{name} holds a number outside [0, 1]; all of its numbers must lie there")
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ObjectiveError(
            f"{name} is {value!r}; it must be a number in [0, 1] or a tensor of such numbers, one per row"
        )


def check_z_loss(z_loss: float) -> None:
    """Raise ObjectiveError unless z_loss is a finite number that is not negative."""
    if isinstance(z_loss, bool) or not isinstance(z_loss, int | float) or not (math.isfinite(z_loss) and z_loss >= 0):
        raise ObjectiveError(f"z_loss is {z_loss!r}; it must be a finite number, 0 or above (PaLM uses 1e-4)")


def _check_tensors(targets: DeviceTargets, hidden_ND: torch.Tensor) -> None:
    rows = int(hidden_ND.shape[0])
    if targets.ids.ndim != 2 or targets.ids.dtype != torch.int64:
        raise TargetsError(f"targets.ids is {targets.ids.dtype} {tuple(targets.ids.shape)}; it must be int64 [N, K]")
    columns = dict.fromkeys(COLUMNS, (rows,))
    for name, shape in {"weights": tuple(targets.ids.shape), **columns}.items():
        value = getattr(targets, name)
        if tuple(value.shape) != shape or not value.dtype.is_floating_point:
            raise TargetsError(
                f"targets.{name} is {value.dtype} {tuple(value.shape)}; it must be floating point with shape {shape}"
            )
    for name in ("ids", "weights", *columns):
        if getattr(targets, name).device != hidden_ND.device:
            raise TargetsError(
                f"targets.{name} is on {getattr(targets, name).device}, but hidden is on {hidden_ND.device}; build "
                "them with SparseTargets.to_device(hidden.device)"
            )


def _check_values(targets: DeviceTargets, columns: int) -> None:
    ids_NK, weights_NK, tail_N = targets.ids, targets.weights, targets.tail_mass
    ascending = (ids_NK[:, 1:] > ids_NK[:, :-1]) & (ids_NK[:, :-1] >= 0)
    for bad, what in (
        ((ids_NK < -1) | (ids_NK >= columns), f"targets.ids holds an id outside the head's {columns} valid columns"),
        (~(ascending | (ids_NK[:, 1:] == -1)), "targets.ids is not ascending and unique, with padding (-1) at the end"),
        (~(weights_NK >= 0) | torch.isinf(weights_NK), "targets.weights holds a weight that is negative or not finite"),
        (~((tail_N >= 0) & (tail_N <= 1)), "targets.tail_mass is outside [0, 1]"),
        (_is_over_one(targets), "targets.weights and tail_mass of a row sum to more than 1"),
    ):
        if bool(bad.any()):
            raise TargetsError(f"{what} (row {int(bad.nonzero()[0, 0])})")


def _is_over_one(targets: DeviceTargets) -> torch.Tensor:
    """bool [N]: probabilities that sum to more than 1; samples may."""
    stored_NK = torch.where(targets.ids >= 0, targets.weights, 0)
    total_N = stored_NK.sum(dim=1, dtype=torch.float64) + targets.tail_mass
    return (total_N > 1 + SUM_TOLERANCE) & (not targets.unbiased)
