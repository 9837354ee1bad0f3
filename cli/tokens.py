"""Ids as text where the teacher's tokenizer is at hand, for commands that do without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from logitcache.errors import UsageError

from .inspect import Decoder

if TYPE_CHECKING:
    from logitcache.store import Cache


def token_text(cache: Cache, folder: str | None) -> Callable[[int], str | None]:
    """An id's text; None for all ids where no folder is given and the teacher is not where the dump found it.

    Nothing is fetched from a hub. Raises ModelError, UsageError when the given folder has no or another tokenizer.
    """
    origin = cache.manifest.origin.teacher
    if folder is None and not (origin and Path(origin).is_dir()):
        return lambda _: None
    try:
        decoder = Decoder(cache, folder)
    except UsageError:
        if folder is not None:
            raise
        return lambda _: None
    return lambda number: decoder.text([number]) if decoder.found else None
