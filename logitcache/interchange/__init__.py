"""Other tools' files: export to Parquet, DistillKit and TRL; import from DistillKit. docs/interchange.md explains."""

from logitcache.interchange.decoding import probabilities
from logitcache.interchange.distillkit import DistillKitLayout, ResidualBin
from logitcache.interchange.export import TARGETS, ExportReport, export_cache
from logitcache.interchange.importing import ImportOptions, ImportReport, import_distillkit
from logitcache.interchange.layouts import choose_layout, read_layout
from logitcache.interchange.ranked import ranked_entries

__all__ = [
    "TARGETS",
    "DistillKitLayout",
    "ExportReport",
    "ImportOptions",
    "ImportReport",
    "ResidualBin",
    "choose_layout",
    "export_cache",
    "import_distillkit",
    "probabilities",
    "ranked_entries",
    "read_layout",
]
