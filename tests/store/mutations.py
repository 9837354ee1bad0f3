"""Random damage to caches, and what comes of reading them: an error of ours, or the data that were written.

Run as `python -m tests.store.mutations CACHE OTHER COUNT SEED`, in a process of its own: damage must not end it, nor
make it take memory. It prints JSON: for each kind of mutation, how many were refused and how many made no difference.
"""

from __future__ import annotations

import io
import json
import resource
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from logitcache.errors import LogitcacheError
from logitcache.store import Blocks, Cache, Manifest, open_cache
from logitcache.store.container import open_container
from logitcache.store.files import canonical_json, checked_json, sealed, sha256_of_file
from logitcache.store.schema import Plan, Shard, load_document
from tests.codec.rows import assert_equal
from tests.store.caches import files_of, rewrite

ADDRESS_SPACE = 4 << 30
NASTY: list[Any] = [
    0, -1, 1, 2, 7, 255, 1 << 16, 1 << 31, (1 << 45) + 1, (1 << 62) - 1, 1 << 70, 1.5, 1e308, True, None,
    "", "x", "../x", "/etc/passwd", "zarr", "arrow", "uint64", "f" * 64, "x" * 3000, [], {}, [1 << 40] * 4, [[]] * 9,
]  # fmt: skip
Random = np.random.Generator


def main(root: Path, other: Path, count: int, seed: int) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    rng = np.random.default_rng(seed)
    expected = open_cache(root).read_blocks(0, 21)
    outcomes: dict[str, Counter[str]] = {}
    work, files = root.with_name("work"), files_of(root)
    shutil.copytree(root, work)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, mutate in MUTATIONS.items():
        seen = outcomes[kind] = Counter()
        for _ in range(count):
            seen[mutate(rng, work, other, expected)] += 1
            restore(work, files)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"outcomes": outcomes, "growth_mb": growth / 1024}


def restore(root: Path, files: dict[str, bytes]) -> None:
    """Undo what a mutation did."""
    found = files_of(root)
    for name, data in files.items():
        if found.get(name) != data:
            (root / name).write_bytes(data)


# ---------------------------------------------------------------------------------------------- bytes


def some_range(rng: Random, size: int) -> slice:
    begin = int(rng.integers(size))
    return slice(begin, min(size, begin + int(rng.integers(1, 40))))


def flip(rng: Random, data: bytearray) -> None:
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def truncate(rng: Random, data: bytearray) -> None:
    del data[rng.integers(len(data)) :]


def overwrite(rng: Random, data: bytearray) -> None:
    place = some_range(rng, len(data))
    data[place] = rng.choice([rng.bytes(8), b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f\0\0\0\0"])[
        : place.stop - place.start
    ]


def swap_ranges(rng: Random, data: bytearray) -> None:
    length = int(rng.integers(1, 60))
    one, two = (int(place) for place in rng.integers(0, max(1, len(data) - length), 2))
    data[one : one + length], data[two : two + length] = data[two : two + length], data[one : one + length]


def cut_out(rng: Random, data: bytearray) -> None:
    del data[some_range(rng, len(data))]


def insert(rng: Random, data: bytearray) -> None:
    place = some_range(rng, len(data))
    data[place.start : place.start] = data[place]


BYTES = [flip, flip, truncate, overwrite, swap_ranges, cut_out, insert]


def damage_container(rng: Random, work: Path, other: Path, expected: Blocks) -> str:
    """Damage below the file's hash: the container alone must notice, in its numbers and its attributes."""
    path = some_file(rng, work, "shards", "codebook")
    container = open_container(path)
    attributes, planes = container.attributes, [container.read_chunk(index) for index in range(container.num_chunks)]
    container.close()
    data = bytearray(path.read_bytes())
    BYTES[rng.integers(len(BYTES))](rng, data)
    path.write_bytes(data)
    try:
        container = open_container(path)
        read = [container.read_chunk(index) for index in range(container.num_chunks)]
    except LogitcacheError:
        return "refused"
    assert container.attributes == attributes
    np.testing.assert_equal(read, planes)
    container.close()
    return "no difference"


def damage_file(rng: Random, work: Path, other: Path, expected: Blocks) -> str:
    """Any file of the cache, read with or without its manifest."""
    if rng.integers(2):
        (work / "manifest.json").unlink()
    path = some_file(rng, work)
    data = bytearray(path.read_bytes())
    BYTES[rng.integers(len(BYTES))](rng, data)
    path.write_bytes(data)
    return read(work, expected)


def exchange_files(rng: Random, work: Path, other: Path, expected: Blocks) -> str:
    """One file missing, in place of another, or from a cache of the same shape."""
    if rng.integers(2):
        (work / "manifest.json").unlink()
    path, sources = some_file(rng, work), [some_file(rng, work), some_file(rng, other)]
    match rng.integers(3):
        case 0:
            path.unlink()
        case 1:
            shutil.copy(sources[1], path)
        case _:
            mine, theirs = path.read_bytes(), sources[0].read_bytes()
            path.write_bytes(theirs)
            sources[0].write_bytes(mine)
    return read(work, expected)


def some_file(rng: Random, root: Path, *folders: str) -> Path:
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and path.parent.name in (folders or path.parts)]
    return paths[rng.integers(len(paths))]


# ---------------------------------------------------------------------------------------------- metadata


def edit(rng: Random, document: dict[str, Any]) -> None:
    """Change, drop or add one value somewhere in a JSON document."""
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = keys[rng.integers(len(keys))]
        inner = place[key]
        if not (isinstance(inner, dict | list) and inner and rng.random() < 0.9):
            break
        place = inner
    action = rng.integers(8)
    if action == 0:
        del place[key]
    elif action == 1 and isinstance(place, dict):
        place["surprise"] = NASTY[rng.integers(len(NASTY))]
    elif action == 2 and type(inner) is int:
        place[key] = inner + int(rng.integers(-2, 3))
    else:
        place[key] = NASTY[rng.integers(len(NASTY))]


def edit_document(rng: Random, work: Path, other: Path, expected: Blocks) -> str:
    """A record with the right checksum, and where possible the right fingerprint."""
    name = rng.choice(["manifest.json", "manifest.json", "plan.json", "commits/000001.json"])
    if name != "manifest.json":
        (work / "manifest.json").unlink()
    path = work / str(name)
    fields = json.loads(path.read_text())
    fields.pop("checksum")
    edit(rng, fields)
    path.write_bytes(checked_json(fields))
    if rng.integers(2) and name == "manifest.json":
        repair_fingerprint(path)
    return read(work, expected)


def edit_metadata(rng: Random, work: Path, other: Path, expected: Blocks) -> str:
    """A container's metadata with right checksums, and the manifest's hash made to suit."""
    path = some_file(rng, work, "shards")
    if path.suffix == ".zip":
        members = read_members(path)
        member = str(rng.choice([name for name in members if name.endswith("zarr.json")]))
        fields = json.loads(members[member])
        edit(rng, fields)
        members[member] = json.dumps(fields).encode()
        write_members(path, members)
    else:
        fields = arrow_metadata(path)
        edit(rng, fields)
        rewrite_arrow(path, fields)
    repair(work, path)
    return read(work, expected)


def read_members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(path: Path, members: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    path.write_bytes(buffer.getvalue())


def arrow_metadata(path: Path) -> dict[str, Any]:
    """What the schema's metadata say, without their checksum."""
    fields = json.loads(pyarrow.ipc.open_file(path.read_bytes()).schema.metadata[b"logitcache"])
    fields.pop("checksum")
    return dict(fields)


def rewrite_arrow(
    path: Path,
    metadata: dict[str, Any] | None = None,
    change: Callable[[Any], Any] = lambda batch: batch,
    compression: str | None = "zstd",
) -> None:
    """Write an Arrow file again with other metadata, sealed, or with changed batches."""
    source = pyarrow.ipc.open_file(path.read_bytes())
    batches = [change(source.get_batch(index)) for index in range(source.num_record_batches)]
    fields = arrow_metadata(path) if metadata is None else metadata
    schema = batches[0].schema.with_metadata({b"logitcache": canonical_json(sealed(fields))})
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_file(str(path), schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))


def repair(root: Path, path: Path) -> None:
    """Make the manifest agree with a changed shard: what somebody would do who wants it read."""
    manifest = root / "manifest.json"
    shards = json.loads(manifest.read_text())["shards"]
    found = {"sha256": sha256_of_file(path), "num_bytes": path.stat().st_size}
    rewrite(manifest, shards=[{**shard, **found} if shard["file"] == path.name else shard for shard in shards])
    repair_fingerprint(manifest)


def repair_fingerprint(path: Path) -> None:
    """Give a manifest the fingerprint of its content, if it has the form of one."""
    try:
        manifest = load_document(path, Manifest)
    except LogitcacheError:
        return
    plan, shards = Plan(identity=manifest.identity), [Shard.of(shard) for shard in manifest.shards]
    rewrite(path, fingerprint=Manifest.fingerprint_of(plan, manifest.codebook_sha256, shards))


# ---------------------------------------------------------------------------------------------- reading


def read(root: Path, expected: Blocks) -> str:
    """All of a cache, as far as it says it goes."""
    try:
        cache: Cache = open_cache(root, partial=True)
        blocks = cache.read_blocks(0, cache.num_blocks)
    except LogitcacheError:
        return "refused"
    np.testing.assert_array_equal(blocks.tokens, expected.tokens)
    np.testing.assert_array_equal(blocks.valid, expected.valid)
    assert_equal(blocks.targets, expected.targets)
    cache.close()
    return "no difference"


MUTATIONS: dict[str, Callable[[Random, Path, Path, Blocks], str]] = {
    "container": damage_container,
    "file": damage_file,
    "exchange": exchange_files,
    "document": edit_document,
    "metadata": edit_metadata,
}

if __name__ == "__main__":
    root, other = map(Path, sys.argv[1:3])
    print(json.dumps(main(root, other, int(sys.argv[3]), int(sys.argv[4]))))  # noqa: T201
