"""What a patched model is called with: labels in two conventions, and the teacher's rows as tensors of a batch.

Legend: B sequences of L tokens, N = B * L positions, K stored ids per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F

from logitcache.errors import ObjectiveError, TargetsError
from logitcache.targets import COLUMNS, DeviceTargets, SparseTargets, empty_row


def pack_targets(targets: SparseTargets | DeviceTargets, shape: tuple[int, int] | None = None) -> dict[str, Any]:
    """The rows as a dict that travels in a batch: `teacher_targets` of a patched model.

    The floating-point columns come as int32 of the same bits: FSDP, DeepSpeed and other wrappers with mixed precision
    round every floating-point input of a forward pass to bfloat16, the teacher's probabilities too.

    Args:
        targets: rows of N positions.
        shape: (B, L) to fold the rows into, so that collators and samplers can cut them along sequences.

    Returns:
        ids int64 and weights int32 [N, K] or [B, L, K]; tail_mass, label_logprob, entropy and threshold int32 [N] or
        [B, L]; unbiased, a bool, and has_exact_head where it is known.
    """
    if isinstance(targets, SparseTargets):
        targets = targets.to_device()
    rows = {"ids": targets.ids}
    for name in ("weights", *COLUMNS):
        rows[name] = getattr(targets, name).to(torch.float32).view(torch.int32)
    packed: dict[str, Any] = {name: rows[name].unflatten(0, shape) if shape else rows[name] for name in rows}
    packed["unbiased"] = targets.unbiased
    if targets.has_exact_head is not None:
        packed["has_exact_head"] = targets.has_exact_head
    return packed


def unpack_targets(targets: Any, unbiased: bool, has_exact_head: bool | None) -> SparseTargets | DeviceTargets:
    """Rows of N positions from what a model was called with.

    Args:
        targets: SparseTargets, DeviceTargets, or a mapping as `pack_targets` makes it; of a mapping the columns may be
            floating point too, and label_logprob, entropy and threshold may be missing.
        unbiased, has_exact_head: for mappings that do not say.

    Raises:
        TargetsError: a key is missing or unknown, or a wrapper rounded the columns to half precision.
    """
    if isinstance(targets, DeviceTargets):
        _check_precision({name: getattr(targets, name) for name in ("weights", *COLUMNS)})
    if isinstance(targets, SparseTargets | DeviceTargets):
        return targets
    if not isinstance(targets, Mapping):
        raise TargetsError(
            f"teacher_targets is a {type(targets).__name__}; pass SparseTargets, DeviceTargets or pack_targets(...)"
        )
    known = [field.name for field in fields(DeviceTargets)]
    unknown, missing = set(targets) - set(known), {"ids", "weights", "tail_mass"} - set(targets)
    if unknown or missing:
        what = f"has unknown keys {sorted(unknown)}" if unknown else f"lacks {sorted(missing)}"
        raise TargetsError(f"teacher_targets {what}; its keys are {', '.join(known)}")
    values = {name: value for name, value in targets.items() if value is not None}
    unbiased = values.pop("unbiased", unbiased)
    has_exact_head = values.pop("has_exact_head", has_exact_head)
    if not isinstance(unbiased, bool) or not isinstance(has_exact_head, bool | None):
        raise TargetsError(
            "unbiased and has_exact_head of teacher_targets must be a bool, not one for each sequence; leave them out "
            "of what is collated and give them to patch_forward(model, unbiased=...)"
        )
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise TargetsError(f"teacher_targets[{name!r}] is a {type(value).__name__}; it must be a tensor")
    values = {
        name: value.view(torch.float32) if value.dtype == torch.int32 else value for name, value in values.items()
    }
    _check_precision(values)
    rows = {name: value.flatten(0, -2 if name in ("ids", "weights") else -1) for name, value in values.items()}
    for name, nothing in empty_row(unbiased).items():
        if name not in rows:
            rows[name] = torch.full_like(rows["tail_mass"], nothing)
    return DeviceTargets(**rows, unbiased=unbiased, has_exact_head=has_exact_head)


def _check_precision(columns: Mapping[str, torch.Tensor]) -> None:
    for name, value in columns.items():
        if value.dtype in (torch.float16, torch.bfloat16):
            raise TargetsError(
                f"teacher_targets[{name!r}] is {value.dtype}, which rounds the teacher's probabilities (FSDP's mixed "
                "precision casts every floating-point input); pass pack_targets(...), whose columns are integers"
            )


def check_flags(targets: SparseTargets | DeviceTargets) -> None:
    """Raise TargetsError if rows with thresholds, as samples have, are called probabilities. Reads values."""
    if isinstance(targets, SparseTargets) or targets.unbiased:
        return
    if bool((targets.threshold > 0).any()):
        raise TargetsError(
            "teacher_targets has rows with a threshold, as sampled rows have, but is not said to be unbiased; add "
            "'unbiased': True to the dict, or patch_forward(model, unbiased=True)"
        )


def next_labels(labels: torch.Tensor | None, shift_labels: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """[B, L] the label of each position, the token that comes next.

    Args:
        labels: transformers' convention: a copy of input_ids, which is shifted here.
        shift_labels: shifted already, transformers' name for it: `shift_labels[b, t]` comes after `input_ids[b, t]`.
            It wins over labels, as in transformers.

    Raises:
        ObjectiveError: both are None.
    """
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ObjectiveError(
            "teacher_targets came without labels, which say what positions count; pass labels (transformers' "
            "convention) or shift_labels (the next token of each position)"
        )
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def check_alignment(
    input_ids: torch.Tensor, labels: torch.Tensor | None, shift_labels: torch.Tensor | None, ignore_index: int
) -> None:
    """Refuse labels in the other convention than their name says; reads values.

    Labels of one convention hardly ever look like the other's: wherever they count, they would have to be the tokens
    one place on, and not be those of their own place.

    Raises:
        ObjectiveError: labels look shifted already, shift_labels look unshifted, or the two contradict each other.
    """
    if labels is not None and shift_labels is None:
        own, following = _agreement(labels, input_ids, ignore_index)
        if following and not own:
            raise ObjectiveError(
                "labels hold the next token of each position, but labels are shifted inside the model (transformers' "
                "convention), which would make it learn the token after the next; pass them as shift_labels"
            )
    if shift_labels is not None:
        own, following = _agreement(shift_labels, input_ids, ignore_index)
        if own and not following:
            raise ObjectiveError(
                "shift_labels hold each position's own token, which would make the model repeat its input; pass them "
                "as labels, which are shifted inside the model"
            )
    if labels is not None and shift_labels is not None:
        counted = (labels[..., 1:] != ignore_index) & (shift_labels[..., :-1] != ignore_index)
        if bool((counted & (labels[..., 1:] != shift_labels[..., :-1])).any()):
            raise ObjectiveError("labels and shift_labels name different tokens; pass one of them")


def _agreement(labels: torch.Tensor, input_ids: torch.Tensor, ignore_index: int) -> tuple[bool, bool]:
    """Whether the labels that count, but for the last position's, are their own tokens, and whether they are the next.

    Neither when none counts.
    """
    labels = labels[..., :-1]
    counted = labels != ignore_index
    own, following = (
        bool(counted.any() & (~counted | (labels == tokens)).all())
        for tokens in (input_ids[..., :-1], input_ids[..., 1:])
    )
    return own, following
