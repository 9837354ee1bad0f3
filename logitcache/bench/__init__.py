"""`logitcache bench`: what a teacher's caches would cost and be worth, measured on its own text."""

from logitcache.bench.picture import draw_storage
from logitcache.bench.storage import SELECTIONS, Measurement, StorageOptions, measure_storage
from logitcache.bench.table import COLUMNS, NOTE, cells

__all__ = ["COLUMNS", "NOTE", "SELECTIONS", "Measurement", "StorageOptions", "cells", "draw_storage", "measure_storage"]
