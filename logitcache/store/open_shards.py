"""The shards of a cache that are open, the most recently used of them."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from typing import Any

from logitcache.errors import CacheError, DamagedCacheError
from logitcache.store.access import CacheFiles
from logitcache.store.container import Container
from logitcache.store.schema import Manifest, Plan, Shard, most_integers
from logitcache.store.writer import check_attributes


class OpenShards:
    """Opens shards, and keeps as many open as `files` says. A shard's SHA-256 is compared at its first use only.

    Threads may share one, and a forked child may go on: there is no lock that it could inherit locked.
    """

    def __init__(self, manifest: Manifest, files: CacheFiles) -> None:
        self._manifest, self._files = manifest, files
        self._plan = Plan(identity=manifest.identity).fingerprint
        self._verified: set[int] = set()
        self._containers: OrderedDict[int, Container] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_containers": OrderedDict()}

    def __len__(self) -> int:
        return len(self._containers)

    def open(self, number: int) -> Container:
        """The shard of this number in the manifest.

        Raises:
            DamagedCacheError: it is missing, or not what was committed.
            CacheError, RemoteError: it cannot be read.
        """
        container = self._containers.get(number)
        if container is None:
            shard = self._manifest.shards[number]
            container = self._files.open_shard(shard, check=number not in self._verified)
            try:
                self._check(container, shard)
            except CacheError:
                container.close()
                raise
            self._verified.add(number)
            kept = self._containers.setdefault(number, container)
            if kept is not container:  # another thread opened it at the same time
                container.close()
            container = kept
            while len(self._containers) > self._files.open_shards:
                with suppress(KeyError):  # whoever reads it still, in another thread, keeps it open
                    self._containers.popitem(last=False)
        with suppress(KeyError):
            self._containers.move_to_end(number)
        return container

    def close(self) -> None:
        """Release all of them; `open` opens them again."""
        for container in self._containers.values():
            container.close()
        self._containers.clear()

    def _check(self, container: Container, shard: Shard) -> None:
        """Raise unless a container holds what the manifest says of the shard."""
        check_attributes(
            container,
            role="shard",
            plan=self._plan,
            unit=shard.unit,
            first_block=shard.first_block,
            num_tokens=shard.num_tokens,
        )
        chunks = self._manifest.identity.geometry.chunks_in(shard.num_blocks)
        claimed = sum(sum(sizes) for sizes in container.sizes.values())
        if container.num_chunks != chunks or claimed > most_integers(shard.num_tokens, shard.num_entries):
            raise DamagedCacheError(
                f"{container.path} claims {container.num_chunks} chunks and {claimed:,} integers, which the manifest's "
                f"{shard.num_tokens:,} tokens and {shard.num_entries:,} entries cannot have; restore the right file",
                shard=shard.file,
            )
