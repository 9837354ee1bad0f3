"""SparseTargets <-> planar integer arrays. Torch-free; numcodecs compresses the planes in the store."""

from logitcache.codec.frequency import FrequencyRanks
from logitcache.codec.rows import CountsCodec, LogprobCodec, Planes, RowCodec, codec_from_dict

__all__ = ["CountsCodec", "FrequencyRanks", "LogprobCodec", "Planes", "RowCodec", "codec_from_dict"]
