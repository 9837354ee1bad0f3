"""What must be stored of a teacher, computed the plain way: the model's own logits, float64, one position at a time.

Legend: B blocks, L tokens in a block, R real rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.selection import Selection, block_uniforms
from logitcache.targets import SparseTargets
from tests.selection.problems import inverse_cdf, systematic


@dataclass(frozen=True)
class Expected:
    """The teacher's log-probabilities float64 [R, V] over blocks of tokens int64 [B, L], of which R are real."""

    logprobs: NDArray[np.float64]
    tokens: NDArray[np.int64]
    rows: int

    @classmethod
    def of(cls, model: Any, tokens_BL: NDArray[np.int64], rows: int) -> Expected:
        """Run the whole model on one block after another."""
        with torch.no_grad():
            logits = torch.cat([model(torch.from_numpy(block[None])).logits[0] for block in tokens_BL])
        return cls(torch.log_softmax(logits[:rows].double(), -1).numpy(), tokens_BL, rows)

    @property
    def probs(self) -> NDArray[np.float64]:
        return np.exp(self.logprobs)

    def check_scalars(self, targets: SparseTargets, tolerance: float) -> None:
        """Row t holds log p(token t + 1) and the entropy at t; NaN at the ends of blocks and of the corpus."""
        length = self.tokens.shape[1]
        labels = np.append(self.tokens.ravel()[1 : self.rows], -1)
        labels[length - 1 :: length] = -1
        expected = np.where(labels >= 0, self.logprobs[np.arange(self.rows), labels], np.nan)
        assert np.isnan(expected).sum() == -(-self.rows // length)
        np.testing.assert_allclose(targets.label_logprob, expected, rtol=1e-6, atol=tolerance)
        terms = self.probs * np.where(self.probs > 0, self.logprobs, 0)
        np.testing.assert_allclose(targets.entropy, -terms.sum(1), rtol=1e-6, atol=tolerance)

    def check_most_probable(self, targets: SparseTargets, selection: Selection, tolerance: float) -> None:
        """Ids are exactly the most probable ones; weights are right to `tolerance` nats."""
        for row, probs in enumerate(self.probs):
            one = targets.slice(row, row + 1)
            order = np.argsort(-probs, kind="stable")
            count = selection.size
            if selection.mass is not None:
                before = np.cumsum(probs[order]) - probs[order]
                count = min(count, int((before < selection.mass).sum()))
            np.testing.assert_array_equal(one.ids, np.sort(order[:count]), err_msg=f"row {row}")
            error = np.log(one.weights) - self.logprobs[row, one.ids]
            assert np.abs(error).max() <= tolerance, f"row {row}"
            np.testing.assert_allclose(one.tail_mass[0], 1 - probs[one.ids].sum(), atol=tolerance / 2)

    def check_drawn(
        self, targets: SparseTargets, selection: Selection, seed: int, first_block: int = 0, tolerance: float = 1e-3
    ) -> None:
        """Counts equal those of drawing again from float64 probabilities with the same random numbers.

        `tolerance`: of importance weights, in nats.
        """
        blocks, length = self.tokens.shape
        uniforms = block_uniforms(seed, range(first_block, first_block + blocks), length, selection.draws)
        assert targets.unbiased
        exponent = selection.exponent or 1.0
        for row, probs in enumerate(self.probs):
            one = targets.slice(row, row + 1)
            proposal = probs**exponent / (probs**exponent).sum()
            drawn = [inverse_cdf(proposal, uniform) for uniform in uniforms[row]]
            ids, counts = np.unique([column for column, _ in drawn], return_counts=True)
            if min(distance for _, distance in drawn) < 1e-6:
                continue  # a number at the very edge between two ids may fall on either side
            np.testing.assert_array_equal(one.ids, ids, err_msg=f"row {row}")
            expected = counts / selection.draws * probs[ids] / proposal[ids]
            error = np.abs(np.log(one.weights / expected)).max()
            assert error <= (1e-3 if selection.exponent is None else tolerance), f"row {row}"

    def check_varopt(self, targets: SparseTargets, selection: Selection, seed: int, tolerance: float) -> None:
        """Ids are those of selecting again from float64 probabilities; head weights are right to `tolerance` nats."""
        uniforms = block_uniforms(seed, range(len(self.tokens)), self.tokens.shape[1], 1)
        for row, probs in enumerate(self.probs):
            one = targets.slice(row, row + 1)
            ids, near = systematic(probs / probs.sum(), selection.size, uniforms[row, 0])
            head = one.weights > one.threshold[0]
            assert np.abs(np.log(one.weights[head]) - self.logprobs[row, one.ids[head]]).max(initial=0) <= tolerance
            # A cut at the very edge of an id may hit its neighbour.
            assert np.abs(one.ids - ids).max() <= (1 if near < 1e-4 else 0), f"row {row}"

    def check(self, targets: SparseTargets, selection: Selection, seed: int, weights: float, scalars: float) -> None:
        """All of it, with these tolerances in nats."""
        assert len(targets) == self.rows
        self.check_scalars(targets, scalars)
        if selection.method == "varopt":
            self.check_varopt(targets, selection, seed, weights)
        elif selection.unbiased:
            self.check_drawn(targets, selection, seed, tolerance=max(weights, 1e-3))
        else:
            self.check_most_probable(targets, selection, weights)
