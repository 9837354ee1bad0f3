"""What a cache's rows look like, in numbers and pictures. Torch-free."""

from logitcache.stats.measure import CacheStats, Place, StatsOptions, UsedId, measure_stats
from logitcache.stats.picture import check_picture, draw_stats, left_out_panels
from logitcache.stats.tally import Summary

__all__ = [
    "CacheStats",
    "Place",
    "StatsOptions",
    "Summary",
    "UsedId",
    "check_picture",
    "draw_stats",
    "left_out_panels",
    "measure_stats",
]
