"""The cache on disk: shards, manifest, commits. Torch-free. FORMAT.md is the specification."""

from logitcache.store.blocks import Blocks, ChunkRef
from logitcache.store.bucket_writer import open_writer
from logitcache.store.cache import Cache, open_cache
from logitcache.store.convert import convert
from logitcache.store.differences import Wording
from logitcache.store.garbage import Leftover, collect_garbage
from logitcache.store.layout import ContainerKind, Layout
from logitcache.store.location import cache_home
from logitcache.store.repair import Repair, repair
from logitcache.store.schema import Ancestor, Geometry, Identity, Manifest, Origin, Plan, StoredSelection, load_document
from logitcache.store.staging import check_place, prepare_place, remove_staging, staging_folder
from logitcache.store.tokenfile import TokenFile
from logitcache.store.transfer import Transfer, pull, push
from logitcache.store.verify import Problem, Report, verify
from logitcache.store.writer import CacheWriter, check_folder

__all__ = [
    "Ancestor",
    "Blocks",
    "Cache",
    "CacheWriter",
    "ChunkRef",
    "ContainerKind",
    "Geometry",
    "Identity",
    "Layout",
    "Leftover",
    "Manifest",
    "Origin",
    "Plan",
    "Problem",
    "Repair",
    "Report",
    "StoredSelection",
    "TokenFile",
    "Transfer",
    "Wording",
    "cache_home",
    "check_folder",
    "check_place",
    "collect_garbage",
    "convert",
    "load_document",
    "open_cache",
    "open_writer",
    "prepare_place",
    "pull",
    "push",
    "remove_staging",
    "repair",
    "staging_folder",
    "verify",
]
