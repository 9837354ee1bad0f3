"""Batches of a cache as a torch IterableDataset with an exact, tiny state.

Legend: B blocks of a batch, L block length, N = B * L rows, K longest row of the batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from logitcache.errors import TrainingError
from logitcache.reader.order import CHUNKS_PER_WINDOW, BlockOrder
from logitcache.store import Blocks, Cache
from logitcache.targets import DeviceTargets, SparseTargets

Batch = dict[str, Any]


@dataclass(frozen=True)
class ReaderOptions:
    """How a cache is read.

    Args:
        batch_blocks: blocks in one batch of one rank.
        seed: of the order.
        first_block, stop_block: read only blocks in [first_block, stop_block); the whole cache by default.
        rank, world_size: this process' slice of every global batch of batch_blocks * world_size blocks.
        prefetch_batches: batches prepared ahead, off the training thread; 0 prepares them on it.
        with_targets: False leaves the teacher's rows out, for training on labels alone.
    """

    batch_blocks: int
    seed: int = 0
    first_block: int = 0
    stop_block: int | None = None
    rank: int = 0
    world_size: int = 1
    prefetch_batches: int = 4
    with_targets: bool = True


class CacheDataset(IterableDataset[Batch]):
    """Endless, or `num_batches` long, stream of this rank's batches.

    A batch is `{"input_ids": int64 [B, L], "labels": int64 [B, L], "targets": {...}}`; the targets are the tensors of
    `DeviceTargets` (rebuild it with `batch_targets`). The sequence of global batches is the same for every world size
    that divides it and every number of workers. Use it with `DataLoader(dataset, batch_size=None)`.

    Raises:
        TrainingError: the options do not fit the cache.
    """

    def __init__(self, cache: Cache, options: ReaderOptions, num_batches: int | None = None) -> None:
        stop = cache.num_blocks if options.stop_block is None else options.stop_block
        if not 0 <= options.first_block < stop <= cache.num_blocks:
            raise TrainingError(
                f"blocks [{options.first_block}, {stop}) cannot be read from a cache of {cache.num_blocks} blocks"
            )
        if options.batch_blocks < 1 or not 0 <= options.rank < options.world_size:
            raise TrainingError(f"a batch of {options.batch_blocks} blocks on rank {options.rank} makes no sense")
        self.cache, self.options, self.num_batches = cache, options, num_batches
        self.order = BlockOrder(cache.fingerprint, cache.chunks, options.first_block, stop, options.seed)
        self.samples_seen = 0
        cache.keep_chunks(CHUNKS_PER_WINDOW + 1)

    @property
    def global_batch_blocks(self) -> int:
        """Blocks of one batch over all ranks."""
        return self.options.batch_blocks * self.options.world_size

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: enough to go on exactly, with any world size and number of workers."""
        return {
            "fingerprints": [self.cache.fingerprint],
            "seed": self.options.seed,
            "blocks": [self.order.first_block, self.order.stop_block],
            "epoch": self.samples_seen // self.order.num_blocks,
            "samples_seen": self.samples_seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises TrainingError when it is of another cache, seed or range."""
        mine = self.state_dict()
        for name in ("fingerprints", "seed", "blocks"):
            if state.get(name) != mine[name]:
                raise TrainingError(
                    f"the reader state to resume from has {name} {state.get(name)!r}, but this run reads "
                    f"{mine[name]!r}; resume with the same cache, seed and held-out share, or start a new --out"
                )
        self.samples_seen = int(state["samples_seen"])

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        index, step = (worker.id, worker.num_workers) if worker else (0, 1)
        batches = self._batches(self.samples_seen, index, step)
        if self.options.prefetch_batches:
            batches = _prefetched(batches, self.options.prefetch_batches)
        for batch in batches:
            # Counted when handed over, not when prepared: what a consumer has not received is read again.
            self.samples_seen += self.global_batch_blocks * step
            yield batch

    def _batches(self, start: int, number: int, step: int) -> Iterator[Batch]:
        while self.num_batches is None or number < self.num_batches:
            place = start + number * self.global_batch_blocks + self.options.rank * self.options.batch_blocks
            yield self._make(self.order.samples(place, self.options.batch_blocks))
            number += step

    def _make(self, blocks: NDArray[np.int64]) -> Batch:
        parts = [self.cache.read_blocks(int(block), int(block) + 1) for block in blocks]
        return make_batch(parts, self.options.with_targets)


def make_batch(parts: list[Blocks], with_targets: bool = True) -> Batch:
    """Collate blocks into one batch of CPU tensors."""
    batch: Batch = {
        "input_ids": torch.from_numpy(np.concatenate([part.tokens for part in parts])),
        "labels": torch.from_numpy(np.concatenate([part.labels() for part in parts])),
    }
    if with_targets:
        targets = SparseTargets.concatenate([part.targets for part in parts]).to_device()
        batch["targets"] = {name: getattr(targets, name) for name in TENSORS}
    return batch


TENSORS = ("ids", "weights", "tail_mass", "label_logprob", "entropy", "threshold")


def batch_targets(batch: Batch, unbiased: bool) -> DeviceTargets:
    """The DeviceTargets of a batch, wherever its tensors have been moved."""
    return DeviceTargets(**{name: batch["targets"][name] for name in TENSORS}, unbiased=unbiased)


def _prefetched(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Run an iterator on a thread of its own, at most `depth` items ahead; its exceptions surface here."""
    items: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: tuple[str, Any]) -> None:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(("batch", batch))
                if stopped.is_set():
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, daemon=True, name="logitcache-reader")
    thread.start()
    try:
        while True:
            kind, value = items.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
