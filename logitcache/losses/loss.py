"""The public loss: cross entropy on the labels mixed with a divergence from cached teacher targets.

Legend: N rows (token positions), D width, V rows of the head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from logitcache.kernels import (
    GatherResult,
    HeadOptions,
    VocabularyShard,
    choose_implementation,
    dense_logits,
    linear_gather,
    linear_gather_total,
)
from logitcache.losses.objective import Objective
from logitcache.losses.options import LossOptions, denominator
from logitcache.losses.rows import LossRows, prepare_rows
from logitcache.losses.terms import DistillationTerms
from logitcache.targets import DeviceTargets, SparseTargets


class LossOutput(NamedTuple):
    """A loss with its graph, and the terms of each row for logging.

    `terms` carry a graph where the implementation keeps one: not after impl='chunk', whose gradients are made already.
    """

    loss: torch.Tensor
    terms: DistillationTerms


def distillation_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    targets: SparseTargets | DeviceTargets | None,
    objective: Objective | None = None,
    alpha: float | torch.Tensor = 0.9,
    temperature: float = 1.0,
    impl: str = "auto",
    reduction: str = "mean",
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    valid_vocab: int | None = None,
    shard: VocabularyShard | None = None,
    ignore_index: int = -100,
    normalizer: float | torch.Tensor | None = None,
    blend: float | torch.Tensor = 0.5,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """(1 - alpha) * CE + alpha * T^2 * divergence over the rows that count, without an [N, V] tensor.

    Args:
        hidden: [N, D] the student's last hidden states: float64, float32, float16 or bfloat16.
        weight: [V, D] the LM head; its type may differ from hidden's.
        labels: int64 [N], the next token. Rows with `ignore_index` count for neither term.
        targets: the teacher's rows; None where they are not read: objective cross_entropy, or alpha == 0.
        objective: by default what suits the targets: forward_kl with 'bucket' for top-k and top-p, 'unbiased' for
            sampled ones.
        alpha: weight of the divergence, in [0, 1]. A Python 0 is exactly Objective.cross_entropy(); a Python 1 leaves
            the cross entropy out, so that labels only say which rows count (and where tail='label' puts the tail, and
            which token policy_gradient weighs). A tensor, one number or [N], may vary by row.
        temperature: T of the divergence; the cross entropy is at 1. Only tail='renormalised' and decoupled allow
            another T than 1.
        impl: 'auto' (the fastest one here), 'chunk' (fastest on CPU), 'split' (least memory), 'triton' (CUDA) or
            'reference' (dense; its cross entropy is torch's, bit for bit). See docs/kernels.md.
        reduction: 'mean' over the rows that count, 'sum', or 'none': [N], with 0 on rows that do not count.
        bias, softcap, logit_scale, valid_vocab: see HeadOptions.
        shard: of a vocabulary-parallel head: weight and bias are this rank's rows, everything else is the same on every
            rank of `shard.group`, and so is the loss; backward gives the whole gradient of hidden and that of the rows.
        ignore_index: the label of rows that do not count.
        normalizer: divides the sum in place of the number of counted rows, for gradient accumulation.
        blend: share of the unbiased term of tail='blend', in [0, 1]; a tensor, one number or [N], may move without
            recompiling. No other objective reads it.
        z_loss: adds z_loss * lse^2 to every counted row, whatever alpha is; lse is the logsumexp of its logits at
            temperature 1. Keeps logits from drifting (PaLM, arXiv:2204.02311, with 1e-4).

    Returns:
        Nats. float64 for float64 inputs, float32 otherwise. When no row counts: 0, with a graph.

    Raises:
        ObjectiveError: an argument does not fit, or the combination has no correct meaning; says what to use instead.
            Also when backward runs a second time through a loss of impl='chunk' (which 'auto' may be).
        TargetsError: the targets are malformed or made for another vocabulary. On GPUs the values of labels and
            DeviceTargets are not looked at, as that would stall the device: a label past the vocabulary gives inf.
    """
    options = LossOptions(objective, alpha, temperature, impl, reduction, ignore_index, normalizer, blend, z_loss)
    head = HeadOptions(bias, softcap, logit_scale, valid_vocab, shard)
    return distillation_output(hidden, weight, labels, targets, options, head).loss


def distillation_output(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    targets: SparseTargets | DeviceTargets | None,
    options: LossOptions | None = None,
    head: HeadOptions | None = None,
) -> LossOutput:
    """`distillation_loss` with everything but the batch in two frozen values, and with the terms of each row.

    Args:
        hidden, weight, labels, targets: as in `distillation_loss`.
        options: objective, alpha, temperature, impl, reduction, ...
        head: bias, softcap, logit_scale, valid_vocab and shard.

    Raises:
        ObjectiveError, TargetsError: as in `distillation_loss`.
    """
    options, head = options or LossOptions(), head or HeadOptions()
    rows = prepare_rows(hidden, weight, labels, targets, options, head, options.with_ce)
    summed = options.reduction != "none" and head.shard is None and not _wants_gradient(options.alpha, options.blend)
    impl = choose_implementation(options.impl, hidden, weight, summed)
    if impl == "chunk" and summed and _wants_gradient(hidden, weight, head.bias):
        return _chunked(hidden, weight, rows, options, head)
    terms = rows.terms(linear_gather(hidden, weight, rows.ids_to_gather, head=head, impl=impl))
    if impl == "reference" and rows.objective.kind == "cross_entropy" and head.shard is None:
        terms = replace(terms, ce=_dense_cross_entropy(hidden, weight, rows, head, "none"))
        if options.z_loss == 0 and options.reduction == "mean" and options.normalizer is None:
            return LossOutput(_dense_cross_entropy(hidden, weight, rows, head, "mean"), terms)
    return LossOutput(terms.loss(options.alpha, options.reduction, options.normalizer), terms)


def _wants_gradient(*values: object) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _chunked(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, rows: LossRows, options: LossOptions, head: HeadOptions
) -> LossOutput:
    """The loss as a sum over chunks of rows, whose gradient is made on the way."""

    def row_loss(start: int, stop: int, result: GatherResult) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        part = rows.slice(start, stop)
        terms = part.terms(result)
        return terms.rows(part.options.alpha).sum(), terms.columns

    total, columns = linear_gather_total(hidden_ND, weight_VD, rows.ids_to_gather, row_loss, head=head)
    terms = rows.terms_of(columns)
    loss = total / denominator(rows.counted_N, options.reduction, options.normalizer)
    return LossOutput(loss.to(rows.dtype), terms)


def _dense_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, rows: LossRows, head: HeadOptions, reduction: str
) -> torch.Tensor:
    """torch's own cross entropy on dense logits: the same bits as F.cross_entropy(hidden @ weight.T, labels)."""
    assert rows.label_N is not None
    logits_NV = dense_logits(hidden_ND, weight_VD, head)
    found = F.cross_entropy(logits_NV, rows.label_N, ignore_index=-1, reduction=reduction)
    # torch's mean over nothing is NaN.
    return found if reduction == "none" else torch.where(rows.counted_N.any(), found, 0.0 * logits_NV.sum())


def distillation_terms(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    targets: SparseTargets | DeviceTargets | None,
    objective: Objective | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    *,
    head: HeadOptions | None = None,
    ignore_index: int = -100,
    with_ce: bool = True,
    blend: float | torch.Tensor = 0.5,
    z_loss: float = 0.0,
) -> DistillationTerms:
    """Cross entropy and divergence of each row from one pass over the head, with a graph through both.

    Args:
        hidden, weight, labels, targets, objective, temperature, impl, ignore_index, blend, z_loss: as in
            `distillation_loss`.
        head: bias, softcap, logit_scale, valid_vocab and shard.
        with_ce: False leaves the cross entropy out; the labels' values are then not read (except by tail='label' and
            policy_gradient).

    Returns:
        DistillationTerms; `terms.loss(alpha)` is what `distillation_loss` returns.

    Raises:
        ObjectiveError, TargetsError: as in `distillation_loss`.
    """
    head = head or HeadOptions()
    options = LossOptions(objective, temperature=temperature, ignore_index=ignore_index, blend=blend, z_loss=z_loss)
    rows = prepare_rows(hidden, weight, labels, targets, options, head, with_ce)
    impl = choose_implementation(impl, hidden, weight, summed=False)
    return rows.terms(linear_gather(hidden, weight, rows.ids_to_gather, head=head, impl=impl))
