"""SparseTargets <-> planar integer arrays. Torch-free; numcodecs compresses the planes in the store."""

from logitcache.codec.codebook import Codebook, Planes
from logitcache.codec.contexts import ContextTable
from logitcache.codec.frequency import FrequencyRanks
from logitcache.codec.memory import FRESH, Arena, Memory, ReusedMemory
from logitcache.codec.rows import CodedRows, LayoutName, RowCodec
from logitcache.codec.values import CountValues, Dither, NoValues, ProbabilityValues, WeightValues, counts_of
from logitcache.codec.varopt import HeadTailValues

__all__ = [
    "FRESH",
    "Arena",
    "Codebook",
    "CodedRows",
    "ContextTable",
    "CountValues",
    "Dither",
    "FrequencyRanks",
    "HeadTailValues",
    "LayoutName",
    "Memory",
    "NoValues",
    "Planes",
    "ProbabilityValues",
    "ReusedMemory",
    "RowCodec",
    "WeightValues",
    "counts_of",
]
