"""A folder of Parquet files that appears whole or not at all, and the errors of reading such files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitcache.errors import InterchangeError
from logitcache.store.files import fsync_folder
from logitcache.store.layout import refuse_file, refuse_inside_cache, writing

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

COMPRESSION = "zstd"
BEGINS_ANEW = "it begins anew"


class NewFolder:
    """A folder being written under a temporary name beside its final one."""

    def __init__(self, working: Path) -> None:
        self._working = working
        self.names: list[str] = []
        self.num_bytes = 0

    @contextmanager
    def parquet(self, name: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
        """A writer of one more file: zstd pages with checksums; on disk when the block ends."""
        import pyarrow.parquet as pq

        path = self._working / name
        path.parent.mkdir(exist_ok=True)
        with pq.ParquetWriter(path, schema, compression=COMPRESSION, write_page_checksum=True) as writer:
            yield writer
        self._finish(path)

    def text(self, name: str, content: str) -> None:
        """Write one small text file."""
        path = self._working / name
        path.write_text(content, encoding="utf-8")
        self._finish(path)

    def _finish(self, path: Path) -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        fsync_folder(path.parent)
        self.names.append(str(path.relative_to(self._working)))
        self.num_bytes += path.stat().st_size


@contextmanager
def new_folder(final: Path) -> Iterator[NewFolder]:
    """Write a folder that takes the name `final` only when the block has ended without an error.

    Raises:
        UsageError: `final` is a file, or lies inside a cache.
        InterchangeError: it holds something already.
        CacheError: it cannot be written; nothing is left behind.
    """
    refuse_file(final)
    if final.exists() and any(final.iterdir()):
        raise InterchangeError(f"{final} is not empty; choose a new or empty folder for --out")
    refuse_inside_cache(final)
    with writing(final, again=BEGINS_ANEW):
        final.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".tmp"))
    try:
        working.chmod(0o755)
        with writing(final, again=BEGINS_ANEW):
            yield NewFolder(working)
            fsync_folder(working)
            working.replace(final)
            fsync_folder(final.parent)
    finally:
        shutil.rmtree(working, ignore_errors=True)


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged or foreign file into an InterchangeError that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InterchangeError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
        what = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise InterchangeError(f"{path} is damaged or not Parquet ({what}); fetch or write it again") from error


def list_array(values: Any, offsets: Any) -> pa.ListArray:
    """An Arrow list column from flat values and int64 offsets [N + 1].

    Raises:
        InterchangeError: the column would hold more values than Arrow's 32-bit offsets can count.
    """
    import numpy as np
    import pyarrow as pa

    if int(offsets[-1]) > np.iinfo(np.int32).max:
        raise InterchangeError("a block holds over 2^31 values, more than an Arrow list column can; export fewer ids")
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), values)
