"""New caches from old ones, without a teacher: fewer ids or draws, merged caches, chosen blocks. Torch-free."""

from logitcache.algebra.derive import Derivation, derive_cache
from logitcache.algebra.merge import merge_caches
from logitcache.algebra.ranges import BlockRanges
from logitcache.algebra.rewrite import Result
from logitcache.algebra.subset import subset_cache
from logitcache.progress import Progress

__all__ = [
    "BlockRanges",
    "Derivation",
    "Progress",
    "Result",
    "derive_cache",
    "merge_caches",
    "subset_cache",
]
