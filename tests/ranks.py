"""Real process groups for tests: gloo over a file, no ports, results by rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.faults import forkserver


def run_ranks(work: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """`work(*args)` in `ranks` processes of one gloo group; what each returned, a tree of tensors and plain values.

    `work` lives in a module that the processes can import. What one of them raises is raised here.
    """
    forkserver()
    mp.start_processes(_enter, (work, ranks, str(folder), args), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def _enter(rank: int, work: Callable[..., Any], ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # The machine's own name need not resolve; the loopback interface is always there.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # What accelerate and transformers look at to find that they are one of several processes.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", store, timedelta(minutes=3), rank=rank, world_size=ranks)
    try:
        torch.save(work(*args), Path(folder) / f"rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
