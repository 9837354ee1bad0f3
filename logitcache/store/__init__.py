"""The cache on disk: shards, manifest, commits. Torch-free. FORMAT.md is the specification."""

from logitcache.store.cache import Blocks, Cache, ChunkRef, open_cache
from logitcache.store.layout import Layout
from logitcache.store.schema import Ancestor, Geometry, Identity, Manifest, Origin, Plan, StoredSelection, load_document
from logitcache.store.tokenfile import TokenFile
from logitcache.store.verify import Problem, Report, verify
from logitcache.store.writer import CacheWriter, check_folder

__all__ = [
    "Ancestor",
    "Blocks",
    "Cache",
    "CacheWriter",
    "ChunkRef",
    "Geometry",
    "Identity",
    "Layout",
    "Manifest",
    "Origin",
    "Plan",
    "Problem",
    "Report",
    "StoredSelection",
    "TokenFile",
    "check_folder",
    "load_document",
    "open_cache",
    "verify",
]
