"""logitcache: distil large language models without a live teacher.

Public names load lazily, so that `import logitcache` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Blocks": "logitcache.store",
    "Cache": "logitcache.store",
    "SparseTargets": "logitcache.targets",
    "errors": "logitcache",
    "losses": "logitcache",
    "open_cache": "logitcache.store",
    "verify": "logitcache.store",
}
__all__ = ["Blocks", "Cache", "SparseTargets", "__version__", "errors", "losses", "open_cache", "verify"]

if TYPE_CHECKING:
    from logitcache import errors, losses
    from logitcache.store import Blocks, Cache, open_cache
    from logitcache.store.verify import verify
    from logitcache.targets import SparseTargets


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'logitcache' has no attribute {name!r}")
    home = _PUBLIC[name]
    if home == "logitcache":
        return importlib.import_module(f"logitcache.{name}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
