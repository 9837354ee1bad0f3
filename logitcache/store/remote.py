"""Reading a cache in a bucket: its shards are fetched whole into a folder that all processes of the machine share."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from logitcache.errors import CacheError, DamagedCacheError, LogitcacheError, RemoteError, UsageError
from logitcache.store.access import CacheFiles, check_shard_file
from logitcache.store.cache import Cache
from logitcache.store.container import Container, open_container
from logitcache.store.documents import MANIFEST, MARKER, PLAN, read_manifest, shard_name
from logitcache.store.files import sha256_of_file
from logitcache.store.layout import Layout
from logitcache.store.location import S3Location, cache_home
from logitcache.store.node_folder import READ_ONLY, Lease, NodeFolder
from logitcache.store.objects import Objects, fetch, open_objects
from logitcache.store.schema import Manifest, Shard

DIR_VARIABLE, SIZE_VARIABLE = "LOGITCACHE_LOCAL_DIR", "LOGITCACHE_LOCAL_SIZE"
DEFAULT_SIZE = "50GB"
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kMGT]?)(i?)B?", re.IGNORECASE | re.ASCII)
# A reader's window of shards, and those it goes on to.
OPEN_SHARDS = 8
PREFETCH_THREADS = 2
SCRATCH = "verify."


class RemoteFiles(CacheFiles):
    """Copies, in a folder of this machine, of the files of a cache elsewhere.

    What arrives is compared with the manifest's hashes, and a copy that was there with its hash at its first use.
    """

    open_shards = OPEN_SHARDS

    def __init__(self, objects: Objects, manifest: Manifest, folder: NodeFolder) -> None:
        self._objects, self._folder = objects, folder
        # Not the URL: equal caches at two places share their copies, a cache that was replaced does not.
        self._key = manifest.fingerprint[:16]
        self._codebook = Layout(Path(), manifest.identity.container).codebook
        self.location, self.root = objects.location, folder.root / self._key
        self.codebook_name = objects.url(self._codebook.as_posix())
        self._ahead: dict[int, _Ahead] = {}
        self._arrived: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": {}}

    def shard_name(self, shard: Shard) -> str:
        return self._objects.url(shard_name(shard))

    def check_shard(self, shard: Shard) -> None:
        self._checked(shard, check=True).close()

    def open_shard(self, shard: Shard, check: bool) -> Container:
        while True:
            lease = self._checked(shard, check)
            try:
                container = open_container(lease.path)
            except BaseException as error:
                lost = isinstance(error, DamagedCacheError) and not lease.path.exists()
                lease.close()
                if lost:  # a lease keeps a file from us, not from who empties the folder
                    continue
                raise
            weakref.finalize(container, lease.close)
            return container

    def _checked(self, shard: Shard, check: bool) -> Lease:
        """A lease on a shard. A copy whose hash is wrong is fetched again."""
        while True:
            lease = self._hold(shard_name(shard), shard.file, shard.num_bytes, shard.sha256)
            if lease.fresh:
                self._arrived.add(shard.file)
            if not check or shard.file in self._arrived:
                return lease
            try:
                check_shard_file(lease.path, shard)
                return lease
            except DamagedCacheError:
                lease.discard()

    @contextmanager
    def codebook(self, sha256: str) -> Iterator[Path]:
        name = self._codebook.as_posix()
        num_bytes = self.codebook_bytes()
        while True:
            lease = self._hold(name, self._codebook.name, num_bytes, sha256)
            if lease.fresh or sha256_of_file(lease.path) == sha256:
                break
            lease.discard()
        try:
            yield lease.path
        finally:
            lease.close()

    def codebook_bytes(self) -> int:
        num_bytes = self._objects.size(self._codebook.as_posix())
        if num_bytes is None:
            raise DamagedCacheError(f"{self.codebook_name} is missing; restore it, or push the cache again")
        return num_bytes

    def num_bytes(self, shards: Sequence[Shard]) -> int:
        return sum(shard.num_bytes for shard in shards) + self._num_document_bytes()

    def missing_shards(self, shards: Sequence[Shard]) -> list[str]:
        return []  # to look for them is a request for each

    def _num_document_bytes(self) -> int:
        named = {MANIFEST, PLAN, self._codebook.as_posix()}
        try:
            found = [
                size for name, size in self._objects.sizes() if name in named or re.match(r"commits/[^/]*\.json", name)
            ]
        except RemoteError:  # who may read need not be allowed to list: then without the commit records
            found = [self._objects.size(name) or 0 for name in named]
        return sum(found)

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Fetch shards on threads, in this order, as far as they fill half of the folder."""
        room, wanted = self._folder.max_bytes // 2, []
        for shard in shards:
            room -= shard.num_bytes
            if room < 0:
                break
            wanted.append(shard)
        self._ahead.setdefault(os.getpid(), _Ahead()).want(self, wanted)

    def fetch_shard(self, shard: Shard) -> None:
        """Have a shard in the folder. Raises as `open_shard`."""
        self._checked(shard, check=False).close()

    def _hold(self, name: str, local_name: str, num_bytes: int, sha256: str) -> Lease:
        arguments = (
            f"{self._key}/{local_name}",
            num_bytes,
            lambda file: fetch(self._objects, name, file, num_bytes, sha256),
        )
        try:
            return self._folder.hold(*arguments)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise CacheError(f"{self._folder.root} cannot be used: {error.strerror}; set {DIR_VARIABLE}") from error
        # It can be read at most: use what is there, and keep everything else in a folder of our own.
        return NodeFolder(_spare_folder(self._folder.root), self._folder.max_bytes).hold(*arguments)


class _Ahead:
    """Threads that fetch what a list names, until it is empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: deque[Shard] = deque()
        self._running = 0

    def want(self, files: RemoteFiles, shards: Sequence[Shard]) -> None:
        """Replace the list."""
        with self._lock:
            self._wanted = deque(shards)
            missing = min(len(shards), PREFETCH_THREADS) - self._running
            self._running += max(missing, 0)
        for _ in range(missing):
            threading.Thread(target=self._work, args=(files,), daemon=True, name="logitcache-prefetch").start()

    def _work(self, files: RemoteFiles) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._running -= 1
                    return
                shard = self._wanted.popleft()
            with suppress(LogitcacheError, OSError):  # who reads the shard meets the error and says it
                files.fetch_shard(shard)


def open_remote(place: S3Location, local_dir: str | Path | None = None, local_bytes: int | None = None) -> Cache:
    """See `open_cache`."""
    return _open(open_objects(str(place)), node_folder(local_dir, local_bytes))


def _open(objects: Objects, folder: NodeFolder) -> Cache:
    manifest = read_manifest(objects)
    if manifest is None:
        if objects.size(PLAN) is not None:
            began = "push" if objects.size(MARKER) is not None else "dump"
            raise CacheError(f"{objects.location} is unfinished; run the `logitcache {began}` that began it again")
        raise CacheError(f"{objects.location} is not a logitcache cache: it has no {MANIFEST}; check bucket and prefix")
    files = RemoteFiles(objects, manifest, folder)
    return Cache(files.root, manifest, files=files)


def node_folder(local_dir: str | Path | None = None, local_bytes: int | None = None) -> NodeFolder:
    """The folder of this machine's copies, as arguments, environment or defaults have it. Raises UsageError."""
    root = Path(local_dir or os.environ.get(DIR_VARIABLE) or cache_home() / "remote")
    if local_bytes is None:
        local_bytes = parse_size(os.environ.get(SIZE_VARIABLE) or DEFAULT_SIZE)
    return NodeFolder(root, local_bytes)


def parse_size(text: str) -> int:
    """Bytes that `50GB`, `1.5 TiB` or `1000000` mean. Raises UsageError."""
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{SIZE_VARIABLE} is {text!r}; write a size such as 50GB or 1.5TiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


@contextmanager
def fetched_anew(place: S3Location) -> Iterator[tuple[Cache, Objects]]:
    """The cache with a folder of its own, so that each file is fetched once more; and its objects."""
    home = node_folder().root
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
    writable = os.access(home, os.W_OK)
    if writable:
        _sweep(home)
    with tempfile.TemporaryDirectory(dir=home if writable else None, prefix=SCRATCH) as scratch:
        objects = open_objects(str(place))
        handle = os.open(scratch, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            cache = _open(objects, NodeFolder(Path(scratch), 0))
            yield cache, objects
            cache.close()
        finally:
            os.close(handle)


def _sweep(home: Path) -> None:
    """Remove the folders of killed runs."""
    for folder in home.glob(f"{SCRATCH}*"):
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(handle)


def _spare_folder(wanted: Path) -> Path:
    """A folder of this user's, among temporary files, for what cannot be written where it was wanted."""
    folder = Path(tempfile.gettempdir()) / f"logitcache-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if folder.is_symlink() or not folder.is_dir() or status.st_uid != os.getuid():
        raise CacheError(f"{wanted} cannot be written, and {folder} is not this user's; set {DIR_VARIABLE}")
    warnings.warn(f"{wanted} cannot be written; what is not there is kept in {folder}", stacklevel=2)
    return folder
