"""What a selection keeps of rows, on its way from the logits' device to SparseTargets.

Legend: n rows, K entries kept or draws a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from logitcache.targets import SparseTargets


@dataclass(frozen=True, eq=False)
class Kept:
    """Arrays of n rows, padded to K a row, and what the processor makes of them. Nothing but `targets` waits.

    Args:
        arrays: tensors [n, ...] by name.
        finish: makes SparseTargets of the same arrays in numpy, its keywords.
    """

    arrays: dict[str, torch.Tensor]
    finish: Callable[..., SparseTargets]

    @staticmethod
    def concatenate(parts: Sequence[Kept]) -> Kept:
        """Rows of all parts, which one selection kept, in order."""
        names = parts[0].arrays
        return Kept({name: torch.cat([part.arrays[name] for part in parts]) for name in names}, parts[0].finish)

    def to_host(self) -> Kept:
        """Begin to copy to the processor; the copy may be used when the device has done what it was told by now."""
        return Kept({name: array.to("cpu", non_blocking=True) for name, array in self.arrays.items()}, self.finish)

    def targets(self) -> SparseTargets:
        """As SparseTargets of n rows, without label_logprob and entropy."""
        arrays: dict[str, NDArray[Any]] = {name: array.cpu().numpy() for name, array in self.arrays.items()}
        return self.finish(**arrays)
