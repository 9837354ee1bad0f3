"""Which processor each of several workers on one machine takes."""

from __future__ import annotations

import torch


def take_device(device: str, place: int, workers_here: int | None = None) -> None:
    """Make the worker at `place` on its machine use a GPU of its own, or its share of the processor's threads.

    Args:
        device: "auto", "cpu" or "cuda", as of a dump.
        place: 0 for the first worker on this machine.
        workers_here: how many share the processor; None where whoever started this process divided it.
    """
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    elif workers_here is not None:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers_here))
