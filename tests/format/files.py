"""The files of a cache, read as FORMAT.md sections 1 to 5 say: documents, geometry, containers.

With `reader.py` a second reader, which shares no code with logitcache: what both read alike, FORMAT.md describes.
Written to be plain, not fast.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pcodec import standalone

VERSION = 1
ENDINGS = {"zarr": ".zarr.zip", "arrow": ".arrow"}
CODECS = [{"name": "numcodecs.pcodec", "configuration": {"level": 8}}, {"name": "crc32c"}]
TYPES = ("uint16", "uint32", "uint64")
SHARD = {"unit", "file", "sha256", "num_bytes", "first_block", "num_blocks", "num_tokens", "num_entries"}
COMMON = {"kind", "format_version"}
FIELDS = {
    "logitcache-plan": COMMON | {"identity", "origin"},
    "logitcache-commit": COMMON | SHARD | {"plan", "codebook_sha256", "counters"},
    "logitcache-manifest": COMMON
    | {"fingerprint", "complete", "identity", "origin", "codebook_sha256", "counters", "shards"},
}
Planes = dict[str, np.ndarray]


class FormatError(Exception):
    """The cache breaks a rule of FORMAT.md."""


def require(condition: object, rule: str) -> None:
    if not condition:
        raise FormatError(rule)


# ---------------------------------------------------------------------------------------------- documents


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def strict_json(data: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require(len(dict(pairs)) == len(pairs), "a key occurs twice")
        return dict(pairs)

    return json.loads(data, object_pairs_hook=unique, parse_constant=lambda name: require(False, name))


def document(path: Path, kind: str) -> dict[str, Any]:
    data = path.read_bytes()
    require(len(data) <= 64 << 20, "a document is over 64 MiB")
    fields: dict[str, Any] = strict_json(data)
    require(fields.pop("checksum") == digest(fields), f"{path.name} differs from its checksum")
    require(fields["format_version"] <= VERSION, "a newer version wrote this")
    require(fields["kind"] == kind and set(fields) == FIELDS[kind], f"{path.name} has other fields")
    return fields


@dataclass
class Index:
    """What manifest, or plan and commits, say.

    Args:
        tokens_of_block: of every block of the whole cache.
    """

    identity: dict[str, Any]
    plan: str
    codebook_sha256: str
    shards: list[dict[str, Any]]
    tokens_of_block: list[int]


def read_index(root: Path) -> Index:
    manifest = root / "manifest.json"
    if manifest.exists():
        fields = document(manifest, "logitcache-manifest")
        identity, codebook, shards = fields["identity"], fields["codebook_sha256"], fields["shards"]
        hashes = [shard["sha256"] for shard in shards]
        require(fields["fingerprint"] == digest([digest(identity), codebook, hashes]), "the fingerprint differs")
    else:
        identity, codebook = document(root / "plan.json", "logitcache-plan")["identity"], ""
        shards = [
            document(path, "logitcache-commit")
            for path in sorted((root / "commits").iterdir(), key=lambda path: path.name)
            if re.fullmatch(r"[0-9]{6,9}\.json", path.name)
        ]
        for shard in shards:
            codebook = codebook or shard["codebook_sha256"]
            require(shard["plan"] == digest(identity), "a commit is of another plan")
            require(shard["codebook_sha256"] == codebook, "a commit is of another codebook")
    tokens = tokens_of_blocks(identity["geometry"])
    _check_shards(shards, identity, tokens)
    units = -(-len(tokens) // identity["geometry"]["unit_blocks"])
    if manifest.exists():
        require(fields["complete"] == (len(shards) == units), "`complete` is not true of the units")
    return Index(identity, digest(identity), codebook, shards, tokens)


def tokens_of_blocks(geometry: dict[str, Any]) -> list[int]:
    length, short = geometry["block_length"], geometry["short_blocks"]
    missing = sum(length - tokens for _, tokens in short)
    count = -(-(geometry["num_tokens"] + missing) // length)
    tokens = [length] * count
    for block, held in short:
        require(0 <= block < count - 1 and 1 <= held < length, "a short block is impossible")
        tokens[block] = held
    require([block for block, _ in short] == sorted({block for block, _ in short}), "short blocks must ascend")
    tokens[-1] = geometry["num_tokens"] - sum(tokens[:-1])
    require(1 <= tokens[-1] <= length, "the last block is impossible")
    return tokens


def _check_shards(shards: list[dict[str, Any]], identity: dict[str, Any], tokens: list[int]) -> None:
    size = identity["geometry"]["unit_blocks"]
    units = [int(shard["unit"]) for shard in shards]
    require(units == sorted(set(units)), "units must ascend")
    for shard in shards:
        first = int(shard["unit"]) * size
        stop = min(first + size, len(tokens))
        require((shard["first_block"], shard["num_blocks"]) == (first, stop - first), "a unit has other blocks")
        require(shard["num_tokens"] == sum(tokens[first:stop]), "a unit has other tokens")
        require(shard["num_entries"] <= 65_535 * shard["num_tokens"], "a unit claims too many entries")
        require(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", shard["file"]), "a file name is no bare name")
        require(shard["file"].endswith(ENDINGS[identity["container"]]), "a file is of another container")
        require(set(shard) >= SHARD, "a shard lacks a field")


# ---------------------------------------------------------------------------------------------- containers


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    """Castagnoli's, bit by bit as its definition has it, a byte at a time."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _CRC[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF


def read_container(
    path: Path, sha256: str, num_bytes: int | None, attributes: dict[str, Any], most: int
) -> list[Planes]:
    """The planes of every chunk, of a file that must have this hash, these attributes and at most so many integers."""
    data = path.read_bytes()
    require(num_bytes in (None, len(data)), f"{path.name} has another size")
    require(hashlib.sha256(data).hexdigest() == sha256, f"{path.name} has another hash")
    chunks, found = (_read_arrow if path.suffix == ".arrow" else _read_zarr)(path, most)
    require(found == attributes, f"{path.name} belongs to another cache or unit")
    return chunks


def _check_sizes(sizes: dict[str, list[int]], most: int) -> int:
    """The number of chunks."""
    counts = {len(row) for row in sizes.values()}
    require(1 <= len(sizes) <= 64 and len(counts) == 1 and min(counts) > 0, "planes have other numbers of chunks")
    every = [size for row in sizes.values() for size in row]
    require(all(0 <= size <= 1 << 26 for size in every) and sum(every) <= most, "too many integers are claimed")
    require(all(re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name) for name in sizes), "a plane's name")
    return counts.pop()


def _read_zarr(path: Path, most: int) -> tuple[list[Planes], dict[str, Any]]:
    with zipfile.ZipFile(path) as archive:
        require(all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist()), "a member is compressed")
        members = {name: archive.read(name) for name in archive.namelist()}
    group = strict_json(members.pop("zarr.json"))
    require((group["zarr_format"], group["node_type"]) == (3, "group"), "there is no Zarr group")
    attributes = group["attributes"]
    sizes = attributes.pop("sizes")
    count = _check_sizes(sizes, most)
    chunks: list[Planes] = [{} for _ in range(count)]
    for name, row in sizes.items():
        width = max(1, *row)
        dtype = _zarr_type(strict_json(members.pop(f"{name}/zarr.json")), [count, width])
        for chunk, size in enumerate(row):
            stored = members.pop(f"{name}/c/{chunk}/0")
            require(crc32c(stored[:-4]) == int.from_bytes(stored[-4:], "little"), "a chunk differs from its CRC")
            integers = standalone.simple_decompress(stored[:-4])
            require(integers.dtype == dtype and integers.size == width, "a chunk has another type or width")
            require(not integers[size:].any(), "a chunk goes on after its end")
            chunks[chunk][name] = integers[:size].astype(np.int64)
    require(not members, "there are members that nothing names")
    return chunks, attributes


def _zarr_type(array: dict[str, Any], shape: list[int]) -> np.dtype[Any]:
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, shape[1]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": CODECS,
    }
    require(all(array[name] == value for name, value in expected.items()), "an array has other metadata")
    require(array["data_type"] in TYPES and not array.get("storage_transformers"), "an array has another type")
    return np.dtype(array["data_type"])


def _read_arrow(path: Path, most: int) -> tuple[list[Planes], dict[str, Any]]:
    reader = pyarrow.ipc.open_file(pyarrow.BufferReader(path.read_bytes()))
    require(set(reader.schema.metadata) == {b"logitcache"}, "the schema has other metadata")
    metadata = strict_json(reader.schema.metadata[b"logitcache"])
    require(metadata.pop("checksum") == digest(metadata), "the metadata differ from their checksum")
    require(set(metadata) == {"attributes", "sizes", "crc32c"}, "the metadata have other fields")
    sizes, checksums = metadata["sizes"], metadata["crc32c"]
    require(sorted(sizes) == sorted(checksums) == sorted(reader.schema.names), "the columns are not those named")
    count = _check_sizes(sizes, most)
    require(reader.num_record_batches == count, "there is not one record batch for each chunk")
    chunks: list[Planes] = []
    for chunk in range(count):
        batch = reader.get_batch(chunk)
        require(batch.num_rows == 1, "a record batch has not one row")
        planes = {}
        for field in reader.schema:
            require(str(field.type) in [f"large_list<item: {kind} not null>" for kind in TYPES], "a column's type")
            require(not field.nullable, "a column is nullable")
            column, size = batch.column(field.name), sizes[field.name][chunk]
            integers = column.values.to_numpy()
            require(column.offsets.to_pylist() == [0, size] and integers.size == size, "a chunk has another size")
            crc = crc32c(integers.astype(integers.dtype.newbyteorder("<")).tobytes())
            require(crc == checksums[field.name][chunk], "a chunk differs from its CRC")
            planes[field.name] = integers.astype(np.int64)
        chunks.append(planes)
    return chunks, metadata["attributes"]
