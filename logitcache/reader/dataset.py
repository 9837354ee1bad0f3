"""Batches of caches as a torch IterableDataset with an exact, tiny state.

Legend: B blocks of a batch, L block length, N = B * L rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from logitcache.errors import TrainingError
from logitcache.reader.mix import Mix
from logitcache.reader.options import ReaderOptions
from logitcache.reader.order import BlockOrder
from logitcache.reader.packed import PackedBatch
from logitcache.reader.sources import AveragedCaches, BlockSource, MixedCaches, shares_of, sources_of
from logitcache.reader.stream import BatchStream, Lane, ReadCount
from logitcache.store import Blocks, Cache
from logitcache.targets import COLUMNS, DeviceTargets, SparseTargets

Batch = dict[str, Any]
# Of a plain dictionary's "targets".
TENSORS = ("ids", "weights", *COLUMNS)


class CacheDataset(IterableDataset[PackedBatch]):
    """Endless, or `num_batches` long, stream of this rank's batches.

    The sequence of global batches is the same for every world size that divides it and every number of workers. Use it
    as it is, or with `DataLoader(dataset, batch_size=None)`; its own threads keep it ahead of training, so that workers
    are seldom worth their memory: each decodes every chunk.

    The position moves with the batches that are handed over. Behind a `DataLoader` with workers it moves in copies of
    this dataset only: take `state_after(batch)` there, or use torchdata's `StatefulDataLoader`.

    Args:
        source: a cache; `AveragedCaches` (several teachers); `MixedCaches` (several corpora).
        options: how to read.
        num_batches: batches of one iteration; None for no end.

    Raises:
        TrainingError: the options do not fit the caches.
        DamagedCacheError: while iterating; what was handed over before stays valid, and so does the position.
    """

    def __init__(
        self,
        source: Cache | AveragedCaches | MixedCaches,
        options: ReaderOptions,
        num_batches: int | None = None,
    ) -> None:
        self.options, self.num_batches = options, num_batches
        mixed = source if isinstance(source, MixedCaches) else None
        self.sources = sources_of(source)
        self._weights = shares_of(len(self.sources), mixed.weights if mixed else None)
        self._ranges = _ranges(self.sources, options, mixed)
        self._orders = [
            BlockOrder("+".join(each.fingerprints), each.chunks, *blocks, options.seed, options.shuffle)
            for each, blocks in zip(self.sources, self._ranges, strict=True)
        ]
        self.samples_seen = 0
        self.count = ReadCount()
        self._worker: list[int] | None = None

    @property
    def order(self) -> BlockOrder:
        """Of the first source, which is the only one unless caches are mixed."""
        return self._orders[0]

    @property
    def global_batch_blocks(self) -> int:
        """Blocks of one batch over all ranks."""
        return self.options.batch_blocks * self.options.world_size

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: enough to go on exactly, with any world size and number of workers.

        Taken inside a worker of a data loader, it is that worker's own, good for the same worker of the same number.
        """
        state = self.state_at(self.samples_seen)
        worker = get_worker_info()
        return state if worker is None else {**state, "worker": [worker.id, worker.num_workers]}

    def state_after(self, batch: PackedBatch) -> dict[str, Any]:
        """The state once `batch` was trained on, wherever it was made: right with any number of loader workers."""
        return self.state_at(batch.samples_seen)

    def state_at(self, samples_seen: int) -> dict[str, Any]:
        """The state once so many blocks were read by all ranks."""
        ranges = [list(blocks) for blocks in self._ranges]
        state: dict[str, Any] = {
            "fingerprints": [name for each in self.sources for name in each.fingerprints],
            "seed": self.options.seed if self.options.shuffle else None,
            "blocks": ranges[0] if len(ranges) == 1 else ranges,
            "epoch": samples_seen // sum(order.num_blocks for order in self._orders),
            "samples_seen": samples_seen,
        }
        if len(state["fingerprints"]) > 1:
            state |= {"weights": self._weights.tolist(), "teachers": [each.shares for each in self.sources]}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises TrainingError when it is of another cache, seed, range or mix."""
        mine = self.state_at(0)
        for name in ("fingerprints", "seed", "blocks", "weights", "teachers"):
            if state.get(name) != mine.get(name):
                raise TrainingError(
                    f"the reader state to resume from has {name} {state.get(name)!r}, but this run reads "
                    f"{mine.get(name)!r}; resume with the same caches, seed and held-out share, or start a new --out"
                )
        seen = state.get("samples_seen")
        if not isinstance(seen, int) or seen < 0:
            raise TrainingError(f"the reader state to resume from has samples_seen {seen!r}; restore an undamaged one")
        self.samples_seen, self._worker = seen, state.get("worker")

    def __iter__(self) -> Iterator[PackedBatch]:
        index, step = self._loader_worker()
        lanes = [Lane(source, order) for source, order in zip(self.sources, self._orders, strict=True)]
        stream = BatchStream(lanes, Mix(self._weights), self.options, self.count)
        try:
            for batch in stream.batches(self.samples_seen, index, step, self.num_batches):
                # Counted when handed over, not when prepared: what a consumer has not received is read again.
                self.samples_seen += self.global_batch_blocks * step
                yield batch
        finally:
            stream.close()

    def _loader_worker(self) -> tuple[int, int]:
        """This process' number among the loader's workers, and how many they are. Raises TrainingError."""
        worker = get_worker_info()
        here = [worker.id, worker.num_workers] if worker else [0, 1]
        if self._worker is not None and self._worker != here:
            raise TrainingError(
                f"the reader state is that of worker {self._worker[0]} of {self._worker[1]} and does not tell worker "
                f"{here[0]} of {here[1]} where to go on; resume with as many workers, or from CacheDataset.state_after"
            )
        return here[0], here[1]


def _ranges(sources: Sequence[BlockSource], options: ReaderOptions, mixed: MixedCaches | None) -> list[tuple[int, int]]:
    """Blocks [first, stop) to read of each source. Raises TrainingError."""
    whole = (options.first_block, options.stop_block) == (0, None)
    if mixed is not None and not whole:
        raise TrainingError("blocks to read of mixed caches are given as MixedCaches(ranges=...), not in the options")
    if mixed is not None and mixed.ranges is not None:
        ranges = [(first, stop) for first, stop in mixed.ranges]
    else:
        stop = options.stop_block
        ranges = [(options.first_block, each.num_blocks if stop is None else stop) for each in sources]
    for each, (first, stop) in zip(sources, ranges, strict=True):
        if not 0 <= first < stop <= each.num_blocks:
            raise TrainingError(
                f"blocks [{first}, {stop}) cannot be read from {each.location}, which has {each.num_blocks} blocks"
            )
    return ranges


def make_batch(parts: list[Blocks], with_targets: bool = True) -> Batch:
    """Collate blocks into one batch of CPU tensors, a plain dictionary."""
    batch: Batch = {
        "input_ids": torch.from_numpy(np.concatenate([part.tokens for part in parts])),
        "labels": torch.from_numpy(np.concatenate([part.labels() for part in parts])),
    }
    if with_targets:
        targets = SparseTargets.concatenate([part.targets for part in parts]).to_device()
        batch["targets"] = {name: getattr(targets, name) for name in TENSORS}
    return batch


def batch_targets(batch: Batch | PackedBatch, unbiased: bool) -> DeviceTargets:
    """The DeviceTargets of a batch of `CacheDataset` or `make_batch`, wherever its tensors have been moved."""
    if isinstance(batch, PackedBatch):
        return batch.targets
    return DeviceTargets(**{name: batch["targets"][name] for name in TENSORS}, unbiased=unbiased)
