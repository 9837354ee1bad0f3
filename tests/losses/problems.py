"""Small distillation problems that hold every awkward row.

Legend: N rows, D width, V rows of the head, K ids per row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from logitcache.losses import Objective, distillation_loss
from logitcache.losses.dense import dense_loss
from logitcache.selection import Selection
from logitcache.selection.distribution import Distribution
from logitcache.selection.select import select
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
# Over classes, at the temperatures that have a meaning.
PHI = [
    (Objective.reverse_kl(), 1.0),
    (Objective.reverse_kl("renormalised"), 2.0),
    (Objective.jsd(), 1.0),
    (Objective.jsd(0.9), 1.0),
    (Objective.jsd(0.2, "renormalised"), 2.0),
    (Objective.skew_kl(), 1.0),
    (Objective.skew_kl(0.3, tail="renormalised"), 0.5),
    (Objective.skew_kl(reverse=True), 1.0),
    (Objective.skew_kl(0.3, reverse=True, tail="renormalised"), 2.0),
    (Objective.skew_kl(0.0, reverse=True), 1.0),
    (Objective.tvd(), 1.0),
    (Objective.tvd("renormalised"), 2.0),
]
OBJECTIVES = [*((Objective.forward_kl(tail), 1.0) for tail in (*BIASED, "unbiased", "blend"))]
OBJECTIVES += [(Objective.forward_kl("renormalised"), temperature) for temperature in (0.5, 2.0)]
OBJECTIVES += PHI
OBJECTIVES += [(Objective.decoupled(), 1.0), (Objective.decoupled(), 2.0), (Objective.mse(), 1.0)]
OBJECTIVES += [(Objective.policy_gradient(), 1.0), (Objective.policy_gradient(0.5), 1.0)]
OF_HEADS = [pair for pair in OBJECTIVES if pair[0].reads_exact_head]


def name_of(value: object) -> str | None:
    """A readable test id."""
    return "-".join(map(str, value.to_dict().values())) if isinstance(value, Objective) else None


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
    return with_scalars(from_rows(rows))


def unbiased_targets(columns: int = V, seed: int = 0) -> SparseTargets:
    """Sampled rows: weights need not sum to 1; an empty row; entropy known in some rows only."""
    rng = np.random.default_rng(seed)
    rows = [[np.sort(rng.permutation(columns)[:n]), rng.random(n)] for n in (3, 5, 0, columns, 4, 3, 1, 2)]
    return with_scalars(from_rows(rows, unbiased=True))


def teacher_probs(columns: int) -> np.ndarray:
    """float32 [N - 1, V]: rows with heads of many lengths, none (flat), all (few possible ids), and a confident one."""
    rng = np.random.default_rng(5)
    rows = [rng.dirichlet(np.full(columns, scale)) for scale in (0.05, 0.2, 0.5, 1.0)]
    rows.append(np.full(columns, 1 / columns))
    rows.append(np.pad([0.5, 0.3, 0.2], (2, columns - 5)))
    rows.append(np.full(columns, 1e-9))
    rows[-1][4] = 1
    return np.stack(rows).astype(np.float32)


def varopt_targets(probs: np.ndarray, size: int = 6) -> SparseTargets:
    """`varopt:6` rows of these distributions, and one of padding, as a reader adds it: no entries, threshold inf."""
    dist = Distribution.from_logits(torch.from_numpy(probs).log())
    kept = select(Selection("varopt", size), dist, np.linspace(0.05, 0.95, len(probs))[:, None])
    return SparseTargets.concatenate([kept, SparseTargets([0, 0], [], [], unbiased=True)])


def with_scalars(targets: SparseTargets, seed: int = 0) -> SparseTargets:
    """label_logprob in every row but the last, which has no label; entropy in two rows of three."""
    rng = np.random.default_rng(seed)
    count = len(targets)
    entropy = np.where(np.arange(count) % 3 == 0, np.nan, rng.random(count))
    label_logprob = np.where(np.arange(count) == N - 1, np.nan, -4 * rng.random(count))
    return targets.with_columns(label_logprob, entropy)


def targets_for(objective: Objective, columns: int = V, seed: int = 0) -> SparseTargets:
    """Rows of a kind that the objective can use."""
    if objective.tail == "blend":
        return with_scalars(varopt_targets(teacher_probs(columns)))
    return (unbiased_targets if objective.tail == "unbiased" else biased_targets)(columns, seed)


def from_rows(rows: list, **options: object) -> SparseTargets:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])])
    ids, weights = (np.concatenate([np.asarray(row[part]) for row in rows]) for part in (0, 1))
    return SparseTargets(offsets=offsets, ids=ids.astype(np.int64), weights=weights, **options)


def one_row(ids: list[int], weights: list[float], objective: Objective, **options: object) -> SparseTargets:
    """A single row, sampled if the objective wants samples; the teacher's log-probability of the label is -1.5."""
    sampled = objective.tail in ("unbiased", "blend")
    if objective.tail == "blend":
        # The two largest weights are the head.
        options.setdefault("threshold", [sorted(weights)[-3] if len(weights) > 2 else 0.0])
    row = [np.array(ids, dtype=np.int64), np.array(weights)]
    return from_rows([row], unbiased=sampled, label_logprob=[-1.5], **options)


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
        self.targets = targets_for(self.objective, columns, self.seed)
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

    def logits(self) -> torch.Tensor:
        """[N, V] with every option of the head."""
        columns = self.head.get("valid_vocab", V)
        logits = (self.hidden @ self.weight.T + self.bias)[:, :columns] * self.head.get("logit_scale", 1.0)
        if "softcap" in self.head:
            logits = self.head["softcap"] * torch.tanh(logits / self.head["softcap"])
        return logits

    def loss(self, **options: object) -> torch.Tensor:
        options = {"objective": self.objective, "temperature": self.temperature, "bias": self.bias, **options}
        targets = options.pop("targets", self.targets)
        labels = options.pop("labels", self.labels)
        return distillation_loss(self.hidden, self.weight, labels, targets, **self.head, **options)

    def dense(self, alpha: float | torch.Tensor, **options: object) -> torch.Tensor:
        """[N], by definition."""
        fixed = self.device_targets, self.objective, alpha, self.temperature
        return dense_loss(self.logits(), self.labels, *fixed, **options)
