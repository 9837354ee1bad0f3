"""Containers: the file of one unit, or of the tables. One module per kind; this one chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logitcache.errors import DamagedCacheError
from logitcache.store.container_file import Container, Plane
from logitcache.store.layout import SUFFIXES, ContainerKind

__all__ = ["Container", "Plane", "kind_of", "open_container", "write_container"]


def write_container(
    kind: ContainerKind, path: Path, chunks: Sequence[Mapping[str, Plane]], attributes: Mapping[str, Any]
) -> None:
    """Write chunks of equal plane names to `path` (truncated if it exists). Equal content gives equal bytes.

    Args:
        kind: "zarr" or "arrow".
        path: of the file, under any name.
        chunks: at least one; planes are integers of any type [size].
        attributes: JSON values, kept beside the planes.

    Raises:
        TargetsError: a plane holds what the format cannot; the message names it.
        OSError: the file cannot be written.
    """
    if kind == "zarr":
        from logitcache.store import container_zarr

        container_zarr.write(path, chunks, attributes)
    else:
        from logitcache.store import container_arrow

        container_arrow.write(path, chunks, attributes)


def open_container(path: Path) -> Container:
    """Open a container for reading; its name's ending says of which kind it is.

    Raises:
        DamagedCacheError: the file is missing, or no container of that kind.
        CacheError: it cannot be read.
    """
    if kind_of(path) == "zarr":
        from logitcache.store.container_zarr import ZarrContainer

        return ZarrContainer(path)
    from logitcache.store.container_arrow import ArrowContainer

    return ArrowContainer(path)


def kind_of(path: Path) -> ContainerKind:
    """The kind of container a file's name promises. Raises DamagedCacheError."""
    for kind, suffix in SUFFIXES.items():
        if path.name.endswith(suffix):
            return kind
    endings = " or ".join(SUFFIXES.values())
    raise DamagedCacheError(f"{path} does not end in {endings}; restore the right file", shard=path.name)
