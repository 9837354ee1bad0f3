"""Small caches that are written into a bucket, and what is found there."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path
from typing import Any

from logitcache.store import CacheWriter, ContainerKind, open_writer, prepare_place
from tests.s3 import Proxy
from tests.store.caches import commit, content, identity

CARD = "README.md"
BUCKETS = count()


def empty_place(proxy: Proxy) -> str:
    """Its URL, in a bucket of its own."""
    return f"{proxy.bucket(f'written{next(BUCKETS)}')}/caches/one"


def there(proxy: Proxy, url: str) -> dict[str, bytes]:
    """All objects at a place."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    listed = proxy.raw("GET", f"/{bucket}?list-type=2&prefix={prefix}/").decode()
    keys = re.findall("<Key>(.*?)</Key>", listed)
    return {key.removeprefix(f"{prefix}/"): proxy.raw("GET", f"/{bucket}/{key}") for key in keys}


def remove(proxy: Proxy, url: str, name: str) -> None:
    proxy.raw("DELETE", f"/{url.removeprefix('s3://')}/{name}")


def begin(url: str, staging: Path, **plan: Any) -> CacheWriter:
    """As a worker does."""
    prepare_place(staging, url)
    return open_writer(staging, identity(**plan), url=url)


def write(url: str, staging: Path, container: ContainerKind = "zarr", seed: int = 0) -> None:
    """A whole cache, or what is missing of it."""
    writer = begin(url, staging, container=container)
    tokens, targets = content(seed=seed)
    writer.forget_lost_units()
    for unit in writer.pending_units():
        commit(writer, unit, tokens, targets)
    writer.finalize()


def written(proxy: Proxy, url: str) -> dict[str, bytes]:
    """What is there, without the card."""
    found = there(proxy, url)
    assert found.pop(CARD).startswith(b"---\n")
    return found
