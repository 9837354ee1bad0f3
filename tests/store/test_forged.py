"""Shards with right checksums and wrong content, claims without measure, and files no writer of ours made."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from logitcache.errors import DamagedCacheError, FormatVersionError
from logitcache.store import CacheWriter, open_cache, verify
from logitcache.store.container import open_container, write_container
from logitcache.store.layout import SUFFIXES, ContainerKind
from tests.faults import run_to_end
from tests.store.caches import CONTAINERS, Made, identity, make_cache, rewrite
from tests.store.containers import KINDS, check, chunks_of
from tests.store.mutations import arrow_metadata, repair, repair_fingerprint, rewrite_arrow

Planes = dict[str, Any]


@pytest.fixture(scope="module", params=CONTAINERS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_cache(tmp_path_factory.mktemp("original") / "cache", container=request.param)


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    return original.copy(tmp_path / "cache")


def forge(made: Made, change: Callable[[Planes], object], **attributes: Any) -> Path:
    """Write unit 1 again with its second chunk's planes, or its attributes, changed; everything else agrees with it."""
    cache = open_cache(made.root)
    shard = cache.manifest.shards[1]
    path = made.root / "shards" / shard.file
    container = open_container(path)
    chunks = [dict(container.read_chunk(chunk)) for chunk in range(container.num_chunks)]
    change(chunks[1])
    names = [name for name in chunks[0] if name in chunks[1]]
    chunks = [{name: chunk[name] for name in [*names, *chunks[1].keys() - names]} for chunk in chunks]
    kind = cache.manifest.identity.container
    write_container(kind, path, chunks, {**container.attributes, **attributes})
    repair(made.root, path)
    return path


PLANES = ("tokens", "ids", "counts", "label_logprob", "entropy")
CHANGES: dict[str, Callable[[Planes, str], Any]] = {
    "one number more": lambda planes, name: planes.update({name: np.append(planes[name], planes[name][:1])}),
    "one number less": lambda planes, name: planes.update({name: planes[name][:-1]}),
    "empty": lambda planes, name: planes.update({name: planes[name][:0]}),
}


@pytest.mark.parametrize("name", PLANES)
@pytest.mark.parametrize("change", CHANGES)
def test_planes_that_contradict_each_other(made: Made, name: str, change: str) -> None:
    path = forge(made, lambda planes: CHANGES[change](planes, name))
    with pytest.raises(DamagedCacheError, match=rf"{path.name}, chunk 1 is damaged: ") as caught:
        open_cache(made.root).read_blocks(0, 21)
    assert (caught.value.shard, caught.value.chunk) == (path.name, 1)
    assert not verify(made.root).ok


@pytest.mark.parametrize("name", ["tokens", "ids", "counts"])
@pytest.mark.parametrize("value", [1000, 1 << 31, (1 << 63) - 1])
def test_numbers_out_of_range(made: Made, name: str, value: int) -> None:
    """A rank outside the vocabulary, more draws than there are, and what overflows when it is added up."""

    def change(planes: Planes) -> None:
        planes[name] = planes[name].astype(np.uint64)
        planes[name][1] = value

    path = forge(made, change)
    with pytest.raises(DamagedCacheError, match=rf"{path.name}, chunk 1 is damaged: "):
        open_cache(made.root).read_blocks(8, 16)


def test_a_missing_plane(made: Made) -> None:
    forge(made, lambda planes: planes.pop("entropy"))
    with pytest.raises(DamagedCacheError, match=r"is damaged: there is no plane 'entropy'"):
        open_cache(made.root).read_blocks(8, 16)


@pytest.mark.parametrize(
    "attributes",
    [
        {"role": "codebook"},
        {"plan": "0" * 64},
        {"unit": "000002"},
        {"first_block": 9},
        {"num_tokens": 39},
        {"surprise": 1},
        {"format_version": 0},
        {"format_version": "1"},
    ],
    ids=str,
)
def test_attributes_of_something_else(made: Made, attributes: dict[str, Any]) -> None:
    forge(made, lambda planes: None)
    assert verify(made.root).ok
    forge(made, lambda planes: None, **attributes)
    with pytest.raises(DamagedCacheError, match=r"of another cache or unit; restore the right file$"):
        open_cache(made.root).read_blocks(8, 16)


def test_a_newer_container_asks_for_an_upgrade(made: Made) -> None:
    forge(made, lambda planes: None, format_version=2, compressed_with="something new")
    with pytest.raises(FormatVersionError, match=r"has format version 2, this logitcache reads up to 1; upgrade"):
        open_cache(made.root).read_blocks(8, 16)


def test_a_codebook_without_its_table(tmp_path: Path) -> None:
    for container in CONTAINERS:
        writer = CacheWriter.open(tmp_path / container, identity(container=container))
        writer.publish_codebook({"other": np.arange(3)})
        with pytest.raises(DamagedCacheError, match=r"tables\..* is damaged: the codebook lacks 'candidates'; restore"):
            writer.codebook()


@pytest.mark.parametrize("ids", [[1, 1], [400], [1 << 40]], ids=str)
def test_a_codebook_with_a_wrong_table(tmp_path: Path, ids: list[int]) -> None:
    none = np.zeros(0, dtype=np.int64)
    for container in CONTAINERS:
        writer = CacheWriter.open(tmp_path / container, identity(container=container))
        writer.publish_codebook({"ids": np.array(ids), "context_sizes": none, "candidates": none})
        with pytest.raises(DamagedCacheError, match=r"is damaged: the frequency table is not a list of distinct ids"):
            writer.codebook()


# ---------------------------------------------------------------------------------------------- claims

ROOM = 128 << 20
BOMB = 1 << 25


def _reading_is_refused(root: Path, message: str) -> None:
    """In a child that may take 128 MB more than it has: the bomb alone would be 256 MB."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, in_use + ROOM))
    with pytest.raises(DamagedCacheError, match=message):
        open_cache(root).read_blocks(8, 16)


def test_a_bomb(made: Made) -> None:
    """Few bytes, valid to the last checksum, that would decode to gigabytes."""
    zeros = np.zeros(BOMB, dtype=np.uint64)
    zeros[0] = 1 << 40

    def change(planes: Planes) -> None:
        planes["ids"] = zeros

    path = forge(made, change)
    assert path.stat().st_size < BOMB / 100
    message = r"claims 3 chunks and [\d,]+ integers, which the manifest's 40 tokens and \d+ entries cannot have"
    run_to_end(multiprocessing.get_context("spawn"), _reading_is_refused, made.root, message)


@pytest.mark.parametrize("claim", [1 << 31, 1 << 45, (1 << 63) - 1, -2])
def test_buffers_that_claim_another_size(tmp_path: Path, claim: int) -> None:
    """Arrow would allocate what the 8 bytes before a compressed buffer say."""
    path = tmp_path / "c.arrow"
    chunks = [{"ids": np.arange(5000) % 3}]
    write_container("arrow", path, chunks, {})
    data, length = path.read_bytes(), (10_000).to_bytes(8, "little")
    assert data.count(length + b"\x28\xb5\x2f\xfd") == 1
    path.write_bytes(data.replace(length + b"\x28\xb5", claim.to_bytes(8, "little", signed=True) + b"\x28\xb5"))
    with pytest.raises(DamagedCacheError, match=rf"a buffer claims {claim} bytes instead of 10000"):
        open_container(path).read("ids", 0)


# ---------------------------------------------------------------------------------------------- other Arrow files


def as_type(type_: Any) -> Callable[[Any], Any]:
    def change(batch: Any) -> Any:
        columns = [column.cast(type_) for column in batch.columns]
        return pyarrow.record_batch(columns, names=batch.schema.names)

    return change


def doubled(batch: Any) -> Any:
    table = pyarrow.Table.from_batches([batch, batch]).combine_chunks()
    return table.to_batches()[0]


ARROW: dict[str, tuple[dict[str, Any], str]] = {
    "another compression": ({"compression": "lz4"}, "FlatbufferError"),
    "no compression": ({"compression": None}, "FlatbufferError"),
    "signed numbers": ({"change": as_type(pyarrow.large_list(pyarrow.int32()))}, "ValueError"),
    "real numbers": ({"change": as_type(pyarrow.large_list(pyarrow.float64()))}, "ValueError"),
    "short lists": ({"change": as_type(pyarrow.list_(pyarrow.uint32()))}, "its columns are not those"),
    "perhaps nulls": ({"change": as_type(pyarrow.large_list(pyarrow.uint32()))}, "its columns are not those"),
    "two rows in a batch": ({"change": doubled}, "is not one list for every plane"),
    "another name": (
        {"change": lambda batch: batch.rename_columns(["counts", "ids"])},
        "differ|instead of|not one list",
    ),
}


@pytest.mark.parametrize("case", ARROW)
def test_arrow_files_that_are_not_ours(tmp_path: Path, case: str) -> None:
    path = tmp_path / "c.arrow"
    write_container("arrow", path, chunks_of(), {"role": "shard"})
    rewrite_arrow(path)
    check(open_container(path), chunks_of())
    settings, message = ARROW[case]
    rewrite_arrow(path, **settings)
    with pytest.raises(DamagedCacheError, match=message):
        check(open_container(path), chunks_of())


@pytest.mark.parametrize("field", ["sizes", "crc32c"])
@pytest.mark.parametrize("value", [{}, {"ids": [40, 7, 0, 90]}, {"ids": [1], "counts": [1]}, [], None, 5])
def test_arrow_metadata_that_name_something_else(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "c.arrow"
    write_container("arrow", path, chunks_of(), {"role": "shard"})
    rewrite_arrow(path, {**arrow_metadata(path), field: value})
    with pytest.raises(DamagedCacheError, match=r"c.arrow"):
        check(open_container(path), chunks_of())


def test_any_arrow_reads_it(tmp_path: Path) -> None:
    """pyarrow's own reader and ours agree on every number."""
    path = tmp_path / "c.arrow"
    write_container("arrow", path, chunks_of(), {"role": "shard"})
    container, source = open_container(path), pyarrow.ipc.open_file(path.read_bytes())
    assert source.schema.names == ["ids", "counts"]
    assert source.num_record_batches == 4
    for chunk in range(4):
        batch = source.get_batch(chunk)
        batch.validate(full=True)
        for name in source.schema.names:
            assert batch.column(name).type.value_type == str(container.read(name, chunk).dtype)
            assert batch.column(name).to_pylist() == [container.read(name, chunk).tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_names_end_as_the_manifest_says(tmp_path: Path, kind: ContainerKind) -> None:
    other = next(suffix for name, suffix in SUFFIXES.items() if name != kind)
    made = make_cache(tmp_path / "cache", container=kind)
    cache = open_cache(made.root)
    path = made.root / "shards" / cache.manifest.shards[0].file
    renamed = path.with_name(path.name.removesuffix(SUFFIXES[kind]) + other)
    path.rename(renamed)
    shards = [shard.model_dump() for shard in cache.manifest.shards]
    shards[0]["file"] = renamed.name
    rewrite(made.root / "manifest.json", shards=shards)
    repair_fingerprint(made.root / "manifest.json")
    with pytest.raises(
        DamagedCacheError, match=rf"unit 000000 is not in a file of container '{kind}'; restore the file$"
    ):
        open_cache(made.root)
