"""How good a student is: cross entropy, divergence from the teacher, top-1 agreement and calibration.

Legend: B blocks of L tokens, N = B * L rows, K stored ids per row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from logitcache import models
from logitcache.kernels import head_statistics
from logitcache.losses import Objective, distillation_terms
from logitcache.losses.patched_forward import options_of
from logitcache.targets import DeviceTargets
from logitcache.training.ranks import ALONE, Ranks

CALIBRATION_BINS = 15
# Sums over counted tokens; `rows` are those with a teacher's row.
_SUMS = ("tokens", "ce", "kl", "agreements", "rows")


@torch.no_grad()
def evaluate_blocks(
    model: Any,
    batches: Iterable[dict[str, Any]],
    unbiased: bool,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Compare a student with labels and with the teacher's rows.

    Args:
        model: the student, in eval mode; under FSDP the sharded model, called equally often on every rank.
        batches: as `make_batch` makes them; on each of several ranks its own share, as many as on the others.
        unbiased: whether the rows are unbiased samples.
        device: where the model is.
        ranks: that share the work; every one gets the metrics of all.

    Returns:
        `ce` (nats on the next token), `kl` (nats, forward KL from the teacher: with a tail bucket for top-k and top-p
        rows, a lower bound of the full KL; an unbiased estimate for sampled rows), `top1` (share of positions where
        the student's most probable id is the teacher's; for sampled rows, the id of most weight), `ece` (expected
        calibration error of the student's most probable id, 15 bins: Guo et al. 2017) and `tokens`.
    """
    sums, calibration = torch.zeros(len(_SUMS), dtype=torch.float64), Calibration()
    for batch in batches:
        labels_N = batch["labels"].to(device).flatten()
        rows = _targets(batch, unbiased, device)
        ce_N, confidence_N, top_N, *divergence = _measured(model, batch["input_ids"].to(device), labels_N, rows)
        counted_N = labels_N >= 0
        counted = float(counted_N.sum())
        found = [counted, float(ce_N[counted_N].double().sum()), 0.0, 0.0, 0.0]
        calibration.add(confidence_N[counted_N], (top_N == labels_N)[counted_N])
        if rows is not None:
            teacher_top_N = rows.ids.gather(1, rows.weights.argmax(1, keepdim=True)).squeeze(1)
            agreements = float((top_N == teacher_top_N)[counted_N].sum())
            found[2:] = [float(divergence[0].double().sum()), agreements, counted]
        sums += torch.tensor(found, dtype=torch.float64)
    calibration.counts = ranks.total(calibration.counts)
    total = dict(zip(_SUMS, ranks.total(sums).tolist(), strict=True))
    tokens = int(total["tokens"])
    metrics = {"ce": total["ce"] / max(1, tokens), "ece": calibration.error(), "tokens": tokens}
    if total["rows"]:
        metrics |= {"kl": total["kl"] / total["rows"], "top1": total["agreements"] / total["rows"]}
    return metrics


def empty_batch() -> dict[str, Any]:
    """A batch that counts no token, for a rank that has none left while others still have one."""
    return {"input_ids": torch.zeros((1, 2), dtype=torch.int64), "labels": torch.full((1, 2), -100)}


def overall(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """The metrics of `evaluate_blocks` for several sets, by their names, as one: means over all their tokens.

    With more than one set, also each set's own `NAME_ce` and `NAME_kl`.
    """
    tokens = sum(each["tokens"] for each in results.values())
    names = set.intersection(*(set(each) for each in results.values())) if results else set()
    metrics = {
        name: sum(each[name] * each["tokens"] for each in results.values()) / max(1, tokens) for name in sorted(names)
    }
    if results:
        metrics["tokens"] = tokens
    if len(results) > 1:
        metrics |= {f"{of}_{name}": each[name] for of, each in results.items() for name in ("ce", "kl") if name in each}
    return metrics


def _targets(batch: dict[str, Any], unbiased: bool, device: torch.device | str) -> DeviceTargets | None:
    if "targets" not in batch:
        return None
    return DeviceTargets(**{name: value.to(device) for name, value in batch["targets"].items()}, unbiased=unbiased)


def _measured(
    model: Any, input_ids: torch.Tensor, labels_N: torch.Tensor, targets: DeviceTargets | None
) -> list[torch.Tensor]:
    """Cross entropy, the largest probability and its id for each position [N]; with targets also the divergence [N]."""
    measured: list[torch.Tensor] = []

    def measure(hidden_ND: torch.Tensor, head: models.LMHead) -> None:
        options = options_of(head)
        stats = head_statistics(hidden_ND, head.weight, labels_N.clamp(min=0).unsqueeze(1), head=options)
        measured.extend([stats.lse - stats.z[:, 0], torch.exp(stats.max_logit - stats.lse), stats.argmax])
        if targets is None:
            return
        objective = Objective.default_for(targets.unbiased)
        terms = distillation_terms(hidden_ND, head.weight, labels_N, targets, objective, head=options, with_ce=False)
        assert terms.divergence is not None
        measured.append(terms.divergence)

    def forward() -> None:
        hidden_ND = models.body_hidden(models.causal_lm(model), input_ids).flatten(0, 1)
        models.with_head(model, hidden_ND, measure)

    models.inside_forward(model, forward)
    return measured


class Calibration:
    """Expected calibration error: mean |accuracy - confidence| over bins of confidence, weighted by their tokens.

    Attributes:
        counts: float64 [3, bins], sums over tokens of 1, their confidence, and whether the prediction was right.
    """

    def __init__(self, bins: int = CALIBRATION_BINS) -> None:
        self.counts = torch.zeros((3, bins), dtype=torch.float64)

    def add(self, confidence: torch.Tensor, correct: torch.Tensor) -> None:
        """Count tokens: confidence in [0, 1] and whether the prediction was right, both [N]."""
        confidence, correct = confidence.double().cpu(), correct.double().cpu()
        bins = self.counts.shape[1]
        index = (confidence * bins).long().clamp(0, bins - 1)
        self.counts.index_add_(1, index, torch.stack([torch.ones_like(confidence), confidence, correct]))

    def error(self) -> float:
        """The error in [0, 1]; 0 before any token."""
        count, confidence, correct = self.counts
        total = float(count.sum())
        return float((correct - confidence).abs().sum()) / total if total else 0.0
