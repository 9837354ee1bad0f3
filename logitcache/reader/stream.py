"""The threads behind a dataset: some decode chunks, one makes batches of them, both a bounded number ahead."""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import get_worker_info

from logitcache.errors import TrainingError
from logitcache.reader.chunks import ChunkCount, ChunkStream
from logitcache.reader.mix import Mix
from logitcache.reader.options import ReaderOptions
from logitcache.reader.order import BlockOrder
from logitcache.reader.packed import PackedBatch, pack
from logitcache.reader.sources import BlockSource


@dataclass(frozen=True, eq=False)
class Lane:
    """One source and the order in which its blocks are read."""

    source: BlockSource
    order: BlockOrder


@dataclass
class ReadCount:
    """What reading has done so far in this process.

    Args:
        chunks: decoded, and held at most.
        batches: handed over.
        waited_seconds: that the consumer waited for batches.
    """

    chunks: ChunkCount = field(default_factory=ChunkCount)
    batches: int = 0
    waited_seconds: float = 0.0


class BatchStream:
    """Makes batches in order, at most `prefetch_batches` ahead. Close it, or drop it, to end its threads.

    Args:
        lanes: sources with their orders.
        mix: which of them gives each block.
        options: of the reader.
        count: is kept up to date.
    """

    def __init__(self, lanes: list[Lane], mix: Mix, options: ReaderOptions, count: ReadCount) -> None:
        self._mix, self._options, self._count = mix, options, count
        threaded = options.prefetch_batches > 0
        self._owner = os.getpid() if threaded else None
        decoding: Executor = ThreadPoolExecutor(options.decode_threads, "logitcache-decode") if threaded else _Inline()
        # The worker of a data loader leaves pinning to the process it works for.
        self._pinned = options.pin_memory and get_worker_info() is None
        self._packing: Executor = _packing_thread(self._pinned) if threaded else _Inline()
        ahead = options.prefetch_chunks if threaded else 0
        self._chunks = [
            ChunkStream(lane.source, lane.order, decoding, ahead, options.with_targets, count.chunks) for lane in lanes
        ]
        self._length = lanes[0].source.block_length
        self._has_exact_head = all(lane.source.has_exact_head for lane in lanes)
        # Also when nobody closes it: a thread that still decodes while the interpreter goes away could crash it.
        self._finalizer = weakref.finalize(self, _shut_down, os.getpid(), self._packing, decoding)

    def close(self) -> None:
        """End the threads; what they are at is finished, what is queued is not begun."""
        self._finalizer()

    def batches(self, start: int, number: int, step: int, count: int | None) -> Iterator[PackedBatch]:
        """Batches `number`, `number + step`, ... below `count`, counted from the block at place `start`.

        Raises TrainingError in a fork, which has none of the threads and would wait for them for ever.
        """
        waiting: deque[Future[PackedBatch]] = deque()
        depth = max(1, self._options.prefetch_batches)
        while True:
            if self._owner not in (None, os.getpid()):
                raise TrainingError(
                    f"this iterator was begun in process {self._owner} and cannot go on in a fork of it; iterate the "
                    "dataset itself here, or read with prefetch_batches=0"
                )
            while len(waiting) < depth and (count is None or number < count):
                waiting.append(self._packing.submit(self._make, start, number))
                number += step
            if not waiting:
                return
            began = time.perf_counter()
            batch = waiting.popleft().result()
            self._count.waited_seconds += time.perf_counter() - began
            self._count.batches += 1
            yield batch

    def _make(self, start: int, number: int) -> PackedBatch:
        options = self._options
        first = start + number * options.batch_blocks * options.world_size
        sources, places = self._mix.places(first + options.rank * options.batch_blocks, options.batch_blocks)
        blocks = [
            self._chunks[source].block(place) for source, place in zip(sources.tolist(), places.tolist(), strict=True)
        ]
        batch = pack(
            blocks,
            self._length,
            options.weights,
            self._pinned,
            self._has_exact_head,
            samples_seen=first + options.batch_blocks * options.world_size,
        )
        for chunks in self._chunks:
            chunks.settle()
        return batch


class _Inline(Executor):
    """Runs what is submitted at once, on the thread that submits it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def _packing_thread(pinned: bool) -> ThreadPoolExecutor:
    """One thread; if it pins memory, then for this process' own GPU and no other."""
    if not pinned:
        return ThreadPoolExecutor(1, "logitcache-reader")
    device = torch.cuda.current_device()
    return ThreadPoolExecutor(1, "logitcache-reader", torch.cuda.set_device, (device,))


def _shut_down(owner: int, packing: Executor, decoding: Executor) -> None:
    if os.getpid() != owner:  # a fork, which has none of the threads
        return
    # Decoding first: what waits for a chunk that nobody will decode any more is told so.
    decoding.shutdown(wait=False, cancel_futures=True)
    packing.shutdown(wait=True, cancel_futures=True)
    decoding.shutdown(wait=True)
