"""Batches of caches as a `LightningDataModule` for `lightning`'s Trainer; the extra `lightning` installs it."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from logitcache.reader.dataset import CacheDataset
from logitcache.reader.options import ReaderOptions
from logitcache.reader.sources import AveragedCaches, MixedCaches
from logitcache.store import Cache

try:
    from lightning.pytorch import LightningDataModule
except ImportError as error:
    raise ImportError("CacheDataModule needs lightning; install it: pip install 'logitcache[lightning]'") from error


class CacheDataModule(LightningDataModule):
    """`PackedBatch`es for `Trainer.fit`, which goes on from a checkpoint (`ckpt_path`) at exactly the next batch.

    The stream has no end: bound a run with the Trainer's `max_steps`, an epoch with its `limit_train_batches`. Rank and
    world size are the Trainer's.

    Args:
        source: a cache; `AveragedCaches` (several teachers); `MixedCaches` (several corpora).
        global_batch_blocks: blocks in one batch over all ranks.
        workers: of the DataLoader; the reader's own threads mostly do without.
        Further keywords go to `ReaderOptions`.

    Raises TrainingError from `fit` when the world size does not divide the batch, the options do not fit the caches, or
    the checkpoint is of another cache, seed or range.
    """

    trainer: Any

    def __init__(
        self, source: Cache | AveragedCaches | MixedCaches, global_batch_blocks: int, workers: int = 0, **options: Any
    ) -> None:
        super().__init__()
        self._source, self._blocks, self._workers, self._options = source, global_batch_blocks, workers, options

    def setup(self, stage: str) -> None:
        split = self._blocks, self.trainer.global_rank, self.trainer.world_size
        self.dataset = CacheDataset(self._source, ReaderOptions.for_rank(*split, **self._options))

    def train_dataloader(self) -> Any:
        return DataLoader(self.dataset, batch_size=None, num_workers=self._workers)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:  # the Trainer has fetched one batch more than it now trains on
            self.dataset.samples_seen = batch.samples_seen
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.dataset.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.dataset.load_state_dict(state_dict)
