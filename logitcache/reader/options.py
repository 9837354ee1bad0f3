"""How caches are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from logitcache.errors import TrainingError
from logitcache.reader.packed import WeightType


@dataclass(frozen=True)
class ReaderOptions:
    """How caches are read.

    Args:
        batch_blocks: blocks in one batch of one rank.
        seed: of the order.
        shuffle: False reads blocks as they are stored, epoch after epoch.
        first_block, stop_block: read only blocks in [first_block, stop_block); the whole cache by default.
        rank, world_size: this process' slice of every global batch of batch_blocks * world_size blocks.
        prefetch_batches: batches prepared ahead, off the training thread; 0 prepares everything on it.
        prefetch_chunks: chunks decoded beyond the window of 8 that batches are being made of.
        decode_threads: threads that decode.
        with_targets: False leaves the teacher's rows out, for training on labels alone.
        weights: type in which weights travel to the device; they arrive as float32.
        pin_memory: make batches in page-locked memory, for copies to a GPU beside other work.
    """

    batch_blocks: int
    seed: int = 0
    shuffle: bool = True
    first_block: int = 0
    stop_block: int | None = None
    rank: int = 0
    world_size: int = 1
    prefetch_batches: int = 4
    prefetch_chunks: int = 8
    decode_threads: int = 2
    with_targets: bool = True
    weights: WeightType = "float32"
    pin_memory: bool = False

    def __post_init__(self) -> None:
        if self.batch_blocks < 1 or not 0 <= self.rank < self.world_size:
            raise TrainingError(
                f"a batch of {self.batch_blocks} blocks on rank {self.rank} of {self.world_size} makes no sense; "
                "give at least one block a rank, and count ranks from 0"
            )
        if self.prefetch_batches < 0 or self.prefetch_chunks < 0 or self.decode_threads < 1:
            raise TrainingError("prefetch_batches and prefetch_chunks cannot be negative, nor decode_threads below 1")
        if self.pin_memory and not torch.cuda.is_available():
            raise TrainingError("pin_memory is for copies to a GPU, and none is there; leave it off")

    @classmethod
    def for_rank(cls, global_batch_blocks: int, rank: int, world_size: int, **options: Any) -> ReaderOptions:
        """A rank's share of batches of `global_batch_blocks`, the same batches for every world size that divides them.

        Raises TrainingError when this one does not.
        """
        if world_size < 1 or global_batch_blocks % world_size:
            raise TrainingError(
                f"a global batch of {global_batch_blocks} blocks cannot be split evenly over {world_size} ranks; "
                "choose a batch that is a multiple of the world size"
            )
        return cls(global_batch_blocks // world_size, rank=rank, world_size=world_size, **options)
