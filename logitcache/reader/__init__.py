"""Caches -> batches: a seeded, resumable order and a torch IterableDataset."""

from logitcache.reader.dataset import Batch, CacheDataset, batch_targets, make_batch
from logitcache.reader.inputs import model_inputs
from logitcache.reader.options import ReaderOptions
from logitcache.reader.order import BlockOrder
from logitcache.reader.packed import PackedBatch
from logitcache.reader.shuffle import ShuffleQuality, shuffle_quality
from logitcache.reader.sources import AveragedCaches, BlockSource, MixedCaches, sources_of
from logitcache.reader.stream import ReadCount

__all__ = [
    "AveragedCaches",
    "Batch",
    "BlockOrder",
    "BlockSource",
    "CacheDataset",
    "MixedCaches",
    "PackedBatch",
    "ReadCount",
    "ReaderOptions",
    "ShuffleQuality",
    "batch_targets",
    "make_batch",
    "model_inputs",
    "shuffle_quality",
    "sources_of",
]
