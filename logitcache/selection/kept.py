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
        settle: makes those arrays of these, its keywords, on the device; None where they are.
    """

    arrays: dict[str, torch.Tensor]
    finish: Callable[..., SparseTargets]
    settle: Callable[..., dict[str, torch.Tensor]] | None = None

    @staticmethod
    def concatenate(parts: Sequence[Kept]) -> Kept:
        """Rows of all parts, which one selection kept, in order."""
        first = parts[0]
        arrays = {name: torch.cat([part.arrays[name] for part in parts]) for name in first.arrays}
        return Kept(arrays, first.finish, first.settle)

    def settled(self) -> Kept:
        """What is done with few numbers a row, at once for many rows: on a CPU each call of torch's takes its time."""
        return self if self.settle is None else Kept(self.settle(**self.arrays), self.finish)

    def to_host(self) -> Kept:
        """Begin to copy to the processor; the copy may be used when the device has done what it was told by now."""
        arrays = {name: array.to("cpu", non_blocking=True) for name, array in self.settled().arrays.items()}
        return Kept(arrays, self.finish)

    def targets(self) -> SparseTargets:
        """As SparseTargets of n rows, without label_logprob and entropy."""
        arrays: dict[str, NDArray[Any]] = {name: array.cpu().numpy() for name, array in self.settled().arrays.items()}
        return self.finish(**arrays)
