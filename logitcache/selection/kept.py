"""What a selection keeps of rows, on its way from the logits' device to SparseTargets.

Legend: n rows, K entries kept or draws a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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


class Gathered:
    """What one selection keeps of R rows, put together from pieces of them.

    Memory for all rows is taken once, with the first piece: small arrays that stay, between large ones that come and
    go, would keep the processor's heap from being used again (a sixth of a small teacher's memory).
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._whole: Kept | None = None

    def put(self, rows: slice, piece: Kept) -> None:
        """Take what is kept of some rows; every row once."""
        if self._whole is None:
            arrays = {name: array.new_empty(self._num_rows, *array.shape[1:]) for name, array in piece.arrays.items()}
            self._whole = replace(piece, arrays=arrays)
        for name, array in piece.arrays.items():
            self._whole.arrays[name][rows] = array

    @property
    def kept(self) -> Kept:
        """Of all rows."""
        assert self._whole is not None, "there are no rows"
        return self._whole
