"""Per-row cross entropy and divergence, and how they are mixed and reduced. Legend: N rows (token positions)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from logitcache.errors import ObjectiveError
from logitcache.losses.checks import check_share
from logitcache.losses.options import check_reduction, denominator


@dataclass(frozen=True, eq=False)
class DistillationTerms:
    """What one batch of N rows costs, before it is mixed and reduced. Values are nats, 0 on rows that do not count.

    Args:
        ce: [N] cross entropy on the label at temperature 1; None when it was not asked for.
        divergence: [N] divergence from the teacher at `temperature`, without the factor T^2; None for a pure
            cross-entropy objective.
        counted: bool [N], False where the label is ignore_index.
        temperature: T.
        dtype: type of the loss.
        z_loss: [N] the coefficient of the z-loss times lse^2, which is added to the mix; None when there is none.
    """

    ce: torch.Tensor | None
    divergence: torch.Tensor | None
    counted: torch.Tensor
    temperature: float
    dtype: torch.dtype
    z_loss: torch.Tensor | None = None

    def loss(
        self,
        alpha: float | torch.Tensor = 0.9,
        reduction: str = "mean",
        normalizer: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(1 - alpha) * ce + alpha * T^2 * divergence + z_loss, reduced; see `distillation_loss`."""
        check_reduction(reduction, normalizer)
        rows_N = self.rows(alpha)
        if reduction == "none":
            return rows_N.to(self.dtype)
        return (rows_N.sum() / denominator(self.counted, reduction, normalizer)).to(self.dtype)

    def rows(self, alpha: float | torch.Tensor = 0.9) -> torch.Tensor:
        """[N] the mixed loss of each row. Of a term with weight exactly 0 (a Python number) nothing enters."""
        check_share("alpha", alpha, len(self.counted))
        mixed_N = self._mixed(alpha)
        return mixed_N if self.z_loss is None else mixed_N + self.z_loss

    def _mixed(self, alpha: float | torch.Tensor) -> torch.Tensor:
        if self.divergence is None or (not isinstance(alpha, torch.Tensor) and alpha == 0):
            return self._need(self.ce, "cross entropy")
        divergence_N = self.divergence * self.temperature**2
        if not isinstance(alpha, torch.Tensor) and alpha == 1:
            return divergence_N
        if isinstance(alpha, torch.Tensor):
            alpha = alpha.to(device=divergence_N.device, dtype=divergence_N.dtype)
        return (1 - alpha) * self._need(self.ce, "cross entropy") + alpha * divergence_N

    @staticmethod
    def _need(term: torch.Tensor | None, name: str) -> torch.Tensor:
        if term is None:
            raise ObjectiveError(f"alpha needs the {name}, which was not computed; ask for it with with_ce=True")
        return term

    @property
    def columns(self) -> dict[str, torch.Tensor]:
        """Those of `ce`, `divergence` and `z_loss` that there are, [N] each."""
        columns = {"ce": self.ce, "divergence": self.divergence, "z_loss": self.z_loss}
        return {name: column for name, column in columns.items() if column is not None}
