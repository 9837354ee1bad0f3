"""The public loss: cross entropy on the labels mixed with a divergence from cached teacher targets.

Legend: N rows (token positions), D width, V rows of the head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from logitcache.kernels import HeadOptions, VocabularyShard, check_head, dense_logits, resolve_implementation
from logitcache.losses.checks import check_label_values, check_labels
from logitcache.losses.objective import Objective, check_alpha
from logitcache.losses.terms import check_reduction, distillation_terms, reduce_rows
from logitcache.targets import DeviceTargets, SparseTargets


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
) -> torch.Tensor:
    """(1 - alpha) * CE + alpha * T^2 * divergence over the rows that count, without an [N, V] tensor.

    Args:
        hidden: [N, D] the student's last hidden states: float64, float32, float16 or bfloat16.
        weight: [V, D] the LM head; its type may differ from hidden's.
        labels: int64 [N], the next token. Rows with `ignore_index` count for neither term.
        targets: the teacher's distributions of the same N rows. May be None when they are not read: objective
            cross_entropy, or alpha == 0.
        objective: by default what suits the targets: forward_kl with 'bucket' for top-k and top-p, 'unbiased' for
            sampled ones.
        alpha: weight of the divergence, in [0, 1]. A Python 0 is exactly Objective.cross_entropy(); a Python 1 leaves
            the cross entropy out, so that labels only say which rows count (and where tail='label' puts the tail).
            A tensor, one number or [N], may vary by row.
        temperature: T of the divergence; the cross entropy is at 1. Only tail='renormalised' allows another T than 1.
        impl: 'auto' (split), 'split' or 'reference' (dense; its cross entropy is torch's, bit for bit).
        reduction: 'mean' over the rows that count, 'sum', or 'none': [N], with 0 on rows that do not count.
        bias, softcap, logit_scale, valid_vocab: see HeadOptions.
        shard: of a vocabulary-parallel head: weight and bias are this rank's rows, everything else is the same on every
            rank of `shard.group`, and so is the loss; backward gives the whole gradient of hidden and that of the rows.
        ignore_index: the label of rows that do not count.
        normalizer: divides the sum in place of the number of counted rows, for gradient accumulation.

    Returns:
        Nats. float64 for float64 inputs, float32 otherwise. When no row counts: 0, with a graph.

    Raises:
        ObjectiveError: an argument does not fit, or the combination has no correct meaning; says what to use instead.
        TargetsError: the targets are malformed or made for another vocabulary. On GPUs the values of labels and
            DeviceTargets are not looked at, as that would stall the device: a label past the vocabulary gives inf.
    """
    head = HeadOptions(bias, softcap, logit_scale, valid_vocab, shard)
    check_reduction(reduction, normalizer)
    check_alpha(alpha)
    fixed = None if isinstance(alpha, torch.Tensor) else alpha
    ce = fixed != 1
    if fixed == 0:
        objective = Objective.cross_entropy()
    pure = isinstance(objective, Objective) and objective.kind == "cross_entropy"
    if pure and shard is None and resolve_implementation(impl) == "reference":
        return _dense_cross_entropy(hidden, weight, labels, head, ignore_index, reduction, normalizer)
    terms = distillation_terms(
        hidden, weight, labels, targets, objective, temperature, impl, head=head, ignore_index=ignore_index, with_ce=ce
    )
    return terms.loss(alpha, reduction, normalizer)


def _dense_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    head: HeadOptions,
    ignore_index: int,
    reduction: str,
    normalizer: float | torch.Tensor | None,
) -> torch.Tensor:
    """torch's own cross entropy on dense logits: the same bits as F.cross_entropy(hidden @ weight.T, labels)."""
    check_head(hidden_ND, weight_VD, head)
    check_labels(labels_N, hidden_ND)
    counted_N = labels_N != ignore_index
    check_label_values(labels_N, counted_N, head.columns(weight_VD))
    logits_NV = dense_logits(hidden_ND, weight_VD, head)
    if reduction == "mean" and normalizer is None and bool(counted_N.any()):
        return F.cross_entropy(logits_NV, labels_N, ignore_index=ignore_index)
    rows_N = F.cross_entropy(logits_NV, labels_N, ignore_index=ignore_index, reduction="none")
    return reduce_rows(rows_N, counted_N, reduction, normalizer)
