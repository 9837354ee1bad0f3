"""Cache -> batches: a seeded, resumable order and a torch IterableDataset."""

from logitcache.reader.dataset import Batch, CacheDataset, ReaderOptions, batch_targets, make_batch
from logitcache.reader.inputs import model_inputs
from logitcache.reader.order import BlockOrder

__all__ = ["Batch", "BlockOrder", "CacheDataset", "ReaderOptions", "batch_targets", "make_batch", "model_inputs"]
