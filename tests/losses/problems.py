"""Small distillation problems that hold every awkward row.

Legend: N rows, D width, V rows of the head, K ids per row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from logitcache.losses import Objective, distillation_loss
from logitcache.losses.dense import dense_loss
from logitcache.targets import DeviceTargets, SparseTargets

N, V, D = 8, 19, 6
HEADS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "scale": {"logit_scale": 0.6},
    "padded": {"valid_vocab": 16},
    "all": {"softcap": 3.0, "logit_scale": 1.3, "valid_vocab": 17},
}
BIASED = ("bucket", "renormalised", "teacher_renormalised", "unnormalised", "label")
OBJECTIVES = [*((Objective.forward_kl(tail), 1.0) for tail in (*BIASED, "unbiased"))]
OBJECTIVES += [(Objective.forward_kl("renormalised"), temperature) for temperature in (0.5, 2.0)]


def biased_targets(columns: int = V, seed: int = 0) -> SparseTargets:
    """Top-k rows: several lengths, an empty row, a row of the whole vocabulary, tau = 0, a zero weight, q = 1."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in (3, 5, 0, columns, 4, 3, 1, 2):
        p = rng.dirichlet(np.full(columns, 0.5))
        ids = np.sort(rng.permutation(columns)[:length])
        rows.append([ids, p[ids]])
    rows[3][1] = rows[3][1] / rows[3][1].sum()
    rows[4][1] = rows[4][1] / rows[4][1].sum()
    rows[5][1][1] = 0.0
    rows[6][1][:] = 1.0
    return from_rows(rows)


def unbiased_targets(columns: int = V, seed: int = 0) -> SparseTargets:
    """Sampled rows: weights need not sum to 1; an empty row; entropy known in some rows only."""
    rng = np.random.default_rng(seed)
    rows = [[np.sort(rng.permutation(columns)[:n]), rng.random(n)] for n in (3, 5, 0, columns, 4, 3, 1, 2)]
    entropy = np.where(np.arange(N) % 3 == 0, np.nan, rng.random(N))
    return from_rows(rows, unbiased=True, entropy=entropy)


def from_rows(rows: list, **options: object) -> SparseTargets:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])])
    ids, weights = (np.concatenate([np.asarray(row[part]) for row in rows]) for part in (0, 1))
    return SparseTargets(offsets=offsets, ids=ids.astype(np.int64), weights=weights, **options)


@dataclass
class Problem:
    """Leaves of a graph, labels in and outside the stored ids, and options of the head."""

    objective: Objective
    temperature: float = 1.0
    head: dict = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.hidden = torch.randn(N, D, generator=g, dtype=torch.float64).requires_grad_()
        self.weight = torch.randn(V, D, generator=g, dtype=torch.float64).requires_grad_()
        self.bias = torch.randn(V, generator=g, dtype=torch.float64).requires_grad_()
        columns = self.head.get("valid_vocab", V)
        make = unbiased_targets if self.objective.tail == "unbiased" else biased_targets
        self.targets = make(columns, self.seed)
        self.labels = torch.randint(0, columns, (N,), generator=g)
        device = self.device_targets
        self.labels[0] = device.ids[0, 1]
        outside = [token for token in range(columns) if token not in device.ids[1].tolist()]
        self.labels[1] = outside[0]
        self.labels[7] = -100

    @property
    def device_targets(self) -> DeviceTargets:
        return self.targets.to_device("cpu")

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.hidden, self.weight, self.bias

    def loss(self, **options: object) -> torch.Tensor:
        options = {"objective": self.objective, "temperature": self.temperature, "bias": self.bias, **options}
        targets = options.pop("targets", self.targets)
        labels = options.pop("labels", self.labels)
        return distillation_loss(self.hidden, self.weight, labels, targets, **self.head, **options)

    def dense(self, alpha: float | torch.Tensor) -> torch.Tensor:
        """[N], by definition."""
        columns = self.head.get("valid_vocab", V)
        logits = (self.hidden @ self.weight.T + self.bias)[:, :columns] * self.head.get("logit_scale", 1.0)
        if "softcap" in self.head:
            logits = self.head["softcap"] * torch.tanh(logits / self.head["softcap"])
        return dense_loss(logits, self.labels, self.device_targets, self.objective, alpha, self.temperature)
