"""How far a selection's gradient is from full knowledge distillation's, on a real teacher's positions.

The student is made of the teacher's hidden states plus noise, at a given total-variation distance; compared is the
gradient of the LM head, the sum over all positions.

Legend: N positions, D width of the hidden state, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.losses import Objective, distillation_loss
from logitcache.selection import Selection, block_uniforms
from logitcache.selection.distribution import Distribution
from logitcache.selection.select import select
from logitcache.targets import SparseTargets
from logitcache.teachers import TransformersTeacher

DISTANCE = 0.45
BISECTIONS = 10


@dataclass(frozen=True)
class GradientError:
    """A gradient beside full knowledge distillation's.

    Args:
        angle: degrees between the two.
        relative_variance: squared norm of their difference over the squared norm of full distillation's.
    """

    angle: float
    relative_variance: float


class Yardstick:
    """Teacher distributions at N positions, a student near them, and the gradient of full distillation.

    Args:
        teacher: loaded in float32, so that its rounding does not count as the cache's.
        tokens_BL: int64 [B, L] blocks; N = B * L. All of [N, V] is held several times: 1,024 positions take about 1 GB.
        distance: mean total-variation distance that the student shall have from the teacher.

    Attributes:
        dist: the teacher's distributions.
        distance: the one that the student has.
        full: float32 [V, D], the gradient of full distillation.
    """

    @torch.inference_mode()
    def __init__(self, teacher: TransformersTeacher, tokens_BL: NDArray[np.int64], distance: float = DISTANCE) -> None:
        self._blocks, self._length = tokens_BL.shape
        hidden = teacher.hidden(tokens_BL).float()
        self._weight = teacher.head.weight.detach().float().clone()
        self.dist = Distribution.from_logits(teacher.logits(hidden.to(teacher.head.weight.dtype)))
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device) * hidden.std()
        self._hidden = hidden + self._noise_level(hidden, noise, distance) * noise
        off = torch.softmax(self._hidden @ self._weight.T, -1).sub_(self.dist.probs)
        # d/dW of the mean full KL: (p_student - p_teacher)^T h / N.
        self.full = off.T @ self._hidden / len(self._hidden)
        self.distance = _distance(off)

    def _noise_level(self, hidden: torch.Tensor, noise: torch.Tensor, distance: float) -> float:
        """By bisection on every fourth row."""
        rows, low, high = slice(None, None, 4), 0.0, 2.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            student = torch.softmax((hidden[rows] + middle * noise[rows]) @ self._weight.T, -1)
            far = _distance(student.sub_(self.dist.probs[rows])) > distance
            low, high = (low, middle) if far else (middle, high)
        return (low + high) / 2

    def select(self, selection: Selection, seed: int = 0) -> SparseTargets:
        """N rows as a dump would select them."""
        uniforms = block_uniforms(seed, range(self._blocks), self._length, selection.draws) if selection.draws else None
        with torch.inference_mode():
            return select(selection, self.dist, uniforms)

    def gradient(self, targets: SparseTargets, objective: Objective, temperature: float = 1.0) -> torch.Tensor:
        """[V, D]: the head's gradient of the objective's mean loss."""
        weight = self._weight.clone().requires_grad_()
        labels = torch.zeros(len(self._hidden), dtype=torch.long, device=weight.device)
        hidden = self._hidden.clone()
        loss = distillation_loss(hidden, weight, labels, targets, objective, alpha=1.0, temperature=temperature)
        return torch.autograd.grad(loss, weight)[0]

    def compare(self, gradient_VD: torch.Tensor) -> GradientError:
        """A gradient in the head beside full distillation's."""
        # Summed in float64: over millions of entries a float32 cosine is no nearer to 1 than that of 2 degrees.
        product, norm, full, error = (
            float(values.sum(dtype=torch.float64))
            for values in (
                gradient_VD * self.full,
                gradient_VD.square(),
                self.full.square(),
                (gradient_VD - self.full).square(),
            )
        )
        cosine = product / math.sqrt(norm * full)
        return GradientError(math.degrees(math.acos(min(1.0, cosine))), error / full)

    def gradient_error(self, targets: SparseTargets) -> GradientError:
        """Of the objective that is the default for such targets: unbiased, or the tail in a bucket."""
        return self.compare(self.gradient(targets, Objective.default_for(targets.unbiased)))


def _distance(difference_NV: torch.Tensor) -> float:
    """Mean total-variation distance, of the differences of probabilities. Overwrites them."""
    return float(0.5 * difference_NV.abs_().sum(1).mean())


def mean_divergence(targets: SparseTargets, decoded: SparseTargets) -> float:
    """Mean KL in nats of decoded rows from the rows that were encoded, the tail being one class."""
    rows, count = targets.row_index(), len(targets)
    given, got = targets.weights.astype(np.float64), decoded.weights.astype(np.float64)
    # A weight that became 0 is an infinite divergence, not a mistake.
    with np.errstate(divide="ignore"):
        per_row = np.bincount(rows, given * (np.log(given) - np.log(got)), minlength=count)
    # Sums that differ by rounding only must not count as divergence: both are brought to 1.
    given_sum = np.bincount(rows, given, minlength=count) + targets.tail_mass
    got_sum = np.bincount(rows, got, minlength=count) + decoded.tail_mass
    tail = targets.tail_mass.astype(np.float64)
    inside = (tail > 0) & (decoded.tail_mass > 0)
    per_row[inside] += tail[inside] * (np.log(tail[inside]) - np.log(decoded.tail_mass[inside].astype(np.float64)))
    filled = given_sum > 0
    per_row[filled] = per_row[filled] / given_sum[filled] + np.log(got_sum[filled] / given_sum[filled])
    return float(per_row.mean())
