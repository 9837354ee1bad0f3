"""How good a student is: cross entropy, divergence from the teacher, top-1 agreement and calibration.

Legend: B blocks of L tokens, N = B * L rows, K stored ids per row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from logitcache import models
from logitcache.kernels import head_statistics
from logitcache.losses import Objective, distillation_terms
from logitcache.losses.patched_forward import options_of
from logitcache.targets import DeviceTargets

CALIBRATION_BINS = 15


@dataclass
class Sums:
    """Running sums over counted tokens."""

    tokens: float = 0.0
    ce: float = 0.0
    kl: float = 0.0
    agreements: float = 0.0
    rows: float = 0.0


@torch.no_grad()
def evaluate_blocks(
    model: Any, batches: Iterable[dict[str, Any]], unbiased: bool, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Compare a student with labels and with the teacher's rows.

    Args:
        model: the student, in eval mode.
        batches: as `make_batch` makes them.
        unbiased: whether the rows are unbiased samples.
        device: where the model is.

    Returns:
        `ce` (nats on the next token), `kl` (nats, forward KL from the teacher: with a tail bucket for top-k and top-p
        rows, a lower bound of the full KL; an unbiased estimate for sampled rows), `top1` (share of positions where
        the student's most probable id is the teacher's; for sampled rows, the id of most weight), `ece` (expected
        calibration error of the student's most probable id, 15 bins: Guo et al. 2017) and `tokens`.
    """
    sums, calibration = Sums(), Calibration()
    for batch in batches:
        hidden_ND, head, labels_N = _forward(model, batch, device)
        options = options_of(head)
        stats = head_statistics(hidden_ND, head.weight, labels_N.clamp(min=0).unsqueeze(1), head=options)
        counted_N = labels_N >= 0
        sums.tokens += float(counted_N.sum())
        sums.ce += float((stats.lse - stats.z[:, 0])[counted_N].double().sum())
        calibration.add(torch.exp(stats.max_logit - stats.lse)[counted_N], (stats.argmax == labels_N)[counted_N])
        if "targets" in batch:
            targets = DeviceTargets(**{k: v.to(device) for k, v in batch["targets"].items()}, unbiased=unbiased)
            objective = Objective.default_for(unbiased)
            terms = distillation_terms(
                hidden_ND, head.weight, labels_N, targets, objective, head=options, with_ce=False
            )
            assert terms.divergence is not None
            sums.kl += float(terms.divergence.double().sum())
            teacher_top = targets.ids.gather(1, targets.weights.argmax(1, keepdim=True)).squeeze(1)
            sums.agreements += float((stats.argmax == teacher_top)[counted_N].sum())
            sums.rows += float(counted_N.sum())
    metrics = {"ce": sums.ce / max(1.0, sums.tokens), "ece": calibration.error(), "tokens": sums.tokens}
    if sums.rows:
        metrics |= {"kl": sums.kl / sums.rows, "top1": sums.agreements / sums.rows}
    return metrics


def overall(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """The metrics of `evaluate_blocks` for several sets, by their names, as one: means over all their tokens.

    With more than one set, also each set's own `NAME_ce` and `NAME_kl`.
    """
    tokens = sum(each["tokens"] for each in results.values())
    names = set.intersection(*(set(each) for each in results.values())) if results else set()
    metrics = {
        name: sum(each[name] * each["tokens"] for each in results.values()) / max(1.0, tokens) for name in sorted(names)
    }
    if results:
        metrics["tokens"] = tokens
    if len(results) > 1:
        metrics |= {f"{of}_{name}": each[name] for of, each in results.items() for name in ("ce", "kl") if name in each}
    return metrics


def _forward(
    model: Any, batch: dict[str, Any], device: torch.device | str
) -> tuple[torch.Tensor, models.LMHead, torch.Tensor]:
    """Hidden states [N, D] with the head to multiply them with, and labels [N]."""
    hidden = models.body_hidden(models.causal_lm(model), batch["input_ids"].to(device)).flatten(0, 1)
    hidden, head = models.with_head(model, hidden, lambda hidden, head: (hidden, head))
    return hidden, head, batch["labels"].to(device).flatten()


class Calibration:
    """Expected calibration error: mean |accuracy - confidence| over bins of confidence, weighted by their tokens."""

    def __init__(self, bins: int = CALIBRATION_BINS) -> None:
        self._count = torch.zeros(bins, dtype=torch.float64)
        self._confidence = torch.zeros(bins, dtype=torch.float64)
        self._correct = torch.zeros(bins, dtype=torch.float64)

    def add(self, confidence: torch.Tensor, correct: torch.Tensor) -> None:
        """Count tokens: confidence in [0, 1] and whether the prediction was right, both [N]."""
        confidence, correct = confidence.double().cpu(), correct.double().cpu()
        index = (confidence * self._count.numel()).long().clamp(0, self._count.numel() - 1)
        self._count.index_add_(0, index, torch.ones_like(confidence))
        self._confidence.index_add_(0, index, confidence)
        self._correct.index_add_(0, index, correct)

    def error(self) -> float:
        """The error in [0, 1]; 0 before any token."""
        total = float(self._count.sum())
        return float((self._correct - self._confidence).abs().sum()) / total if total else 0.0
