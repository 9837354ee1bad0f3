"""The cache on disk: shards, manifest, commits. Torch-free. FORMAT.md is the specification."""

from logitcache.store.cache import Blocks, Cache, ChunkRef, open_cache
from logitcache.store.schema import Geometry, Identity
from logitcache.store.verify import Problem, Report, verify
from logitcache.store.writer import CacheWriter

__all__ = [
    "Blocks",
    "Cache",
    "CacheWriter",
    "ChunkRef",
    "Geometry",
    "Identity",
    "Problem",
    "Report",
    "open_cache",
    "verify",
]
