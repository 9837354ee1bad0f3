"""Tokens, labels and teacher rows for the tests of patched models, and their loss from the model's own logits.

Legend: B sequences of L tokens, N = B * L positions, V ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from logitcache.losses import Objective
from logitcache.losses.dense import dense_loss
from logitcache.targets import SparseTargets

BUCKET = Objective.forward_kl("bucket")


@dataclass
class Example:
    """A batch of 2 x 9 tokens: labels in both conventions (some do not count) and top-k rows of several lengths.

    `labels` are those of transformers, `following` those of the positions.
    """

    columns: int = 300
    seed: int = 0
    batch: int = 2
    length: int = 9

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.ids = torch.randint(0, self.columns, (self.batch, self.length), generator=g)
        self.labels = self.ids.clone()
        self.labels[0, :3] = -100
        self.labels[-1, -2:] = -100
        self.following = torch.full_like(self.ids, -100)
        self.following[:, :-1] = self.labels[:, 1:]
        self.targets = random_rows(self.batch * self.length, self.columns, self.seed)

    @property
    def counted(self) -> int:
        return int((self.following != -100).sum())

    def dense(self, logits: torch.Tensor, objective: Objective = BUCKET, alpha: float = 0.9) -> torch.Tensor:
        """The mean loss by its definition, in float64."""
        rows = logits.double().flatten(0, 1)
        values = dense_loss(rows, self.following.flatten(), self.targets.to_device(), objective, alpha)
        return values.sum() / self.counted


def random_rows(count: int, columns: int, seed: int = 0) -> SparseTargets:
    """Rows of 1 to 6 ids with some tail mass."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, count)
    ids = [np.sort(rng.choice(columns, length, replace=False)) for length in lengths]
    weights = [rng.dirichlet(np.ones(length)) * rng.uniform(0.5, 1) for length in lengths]
    return SparseTargets(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(ids), np.concatenate(weights))


def grads_of(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of all trained parameters, which are cleared again."""
    loss.backward()
    grads = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return grads


def assert_same_grads(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Relative to each gradient's norm; one that is 0 by symmetry (a bias before a softmax) is rounding on both."""
    assert ours.keys() == theirs.keys()
    scale = max(float(grad.norm()) for grad in theirs.values())
    for name, grad in theirs.items():
        error = float((ours[name] - grad).norm())
        assert error <= tolerance * max(float(grad.norm()), 1e-3 * scale), (name, error, float(grad.norm()))
