"""The file of one unit: reproducible bytes, and nothing but its own content comes out of it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec
from zarr.storage import ZipStore

from logitcache.errors import DamagedCacheError, TargetsError
from logitcache.store.container import Container, write_container
from tests.faults import flip_bit, random_bits

Chunks = list[dict[str, np.ndarray]]


def chunks_of(seed: int = 0, sizes: tuple[int, ...] = (40, 7, 0, 90), top: int = 70_000) -> Chunks:
    rng = np.random.default_rng(seed)
    return [{"ids": rng.integers(0, top, size), "counts": rng.integers(0, 3, size // 2)} for size in sizes]


def check(container: Container, chunks: Chunks) -> None:
    assert container.num_chunks == len(chunks)
    for number, chunk in enumerate(chunks):
        read = container.read_chunk(number)
        assert read.keys() == chunk.keys()
        for name, plane in chunk.items():
            assert read[name].dtype == np.int64
            np.testing.assert_array_equal(read[name], plane)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_container(tmp_path / "c.zip", chunks_of(), {"role": "shard"})
    return tmp_path / "c.zip"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 200), min_size=1, max_size=4),
    st.sampled_from([1, 2, 1 << 16, (1 << 16) + 1, 1 << 32, (1 << 32) + 1, 1 << 62]),
)
def test_planes_come_back(tmp_path_factory: pytest.TempPathFactory, seed: int, sizes: list[int], top: int) -> None:
    path = tmp_path_factory.getbasetemp() / "planes.zip"
    chunks = chunks_of(seed, tuple(sizes), top)
    if sizes[0]:
        chunks[0]["ids"][0] = top - 1
    write_container(path, chunks, {"role": "shard", "unit": "000001"})
    container = Container(path)
    assert container.attributes == {"role": "shard", "unit": "000001"}
    check(container, chunks)
    container.close()


def test_bytes_are_reproducible(path: Path, tmp_path: Path) -> None:
    write_container(tmp_path / "again.zip", chunks_of(), {"role": "shard"})
    assert (tmp_path / "again.zip").read_bytes() == path.read_bytes()
    write_container(tmp_path / "again.zip", chunks_of(1), {"role": "shard"})
    assert (tmp_path / "again.zip").read_bytes() != path.read_bytes()


def test_any_zarr_reads_it(path: Path) -> None:
    """The format is Zarr v3, not ours alone."""
    with ZipStore(path, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        assert group["ids"].shape == (4, 90)
        np.testing.assert_array_equal(group["ids"][1, :7], chunks_of()[1]["ids"])


def test_negative_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetsError, match=r"^plane 'ids' holds a negative number"):
        write_container(tmp_path / "c.zip", [{"ids": np.array([3, -1])}], {})


def test_flipped_bits_without_the_files_hash(path: Path) -> None:
    """Even below the SHA-256, no flipped bit survives as other data."""
    original, chunks = path.read_bytes(), chunks_of()
    caught = 0
    for bit in random_bits(np.random.default_rng(1), path, 250):
        flip_bit(path, bit)
        try:
            container = Container(path)
            check(container, chunks)
            container.close()
        except DamagedCacheError:
            caught += 1
        path.write_bytes(original)
    assert caught > 150, "the rest are bits that mean nothing, such as dates in the zip's directory"


# ---------------------------------------------------------------------------------------------- members and metadata


def rezip(path: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the zip again with changed members and right checksums: what an attacker would do."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    path.write_bytes(buffer.getvalue())


def edit(member: str, *keys: Any, value: Any) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        document = json.loads(members[member])
        place = document
        for key in keys[:-1]:
            place = place[key]
        assert place[keys[-1]] != value
        place[keys[-1]] = value
        members[member] = json.dumps(document).encode()

    return change


CHANGES: dict[str, Callable[[dict[str, bytes]], Any]] = {
    "missing chunk": lambda members: members.pop("ids/c/1/0"),
    "extra member": lambda members: members.update({"ids/c/9/0": b"x"}),
    "member outside": lambda members: members.update({"../evil": b"x"}),
    "missing array": lambda members: members.pop("counts/zarr.json"),
    "missing group": lambda members: members.pop("zarr.json"),
    "group is no JSON": lambda members: members.update({"zarr.json": b"{"}),
    "group is a list": lambda members: members.update({"zarr.json": b"[]"}),
    "deep JSON": lambda members: members.update({"zarr.json": b"[" * 100_000}),
    "no arrays": edit("zarr.json", "attributes", "sizes", value={}),
    "huge claim": edit("ids/zarr.json", "shape", value=[4, 1 << 40]),
    "huge claim with sizes": lambda members: [
        edit("ids/zarr.json", "shape", value=[4, 1 << 45])(members),
        edit("ids/zarr.json", "chunk_grid", "configuration", "chunk_shape", value=[1, 1 << 45])(members),
        edit("zarr.json", "attributes", "sizes", "ids", value=[1 << 45, 7, 0, 90])(members),
    ],
    "infinite size": edit("zarr.json", "attributes", "sizes", "ids", value=[float("inf"), 7, 0, 90]),
    "negative size": edit("zarr.json", "attributes", "sizes", "ids", value=[90, 7, -1, 90]),
    "longer": edit("zarr.json", "attributes", "sizes", "ids", value=[40, 7, 0, 91]),
    "fewer chunks": edit("zarr.json", "attributes", "sizes", "ids", value=[40, 7, 0]),
    "other codec": edit("ids/zarr.json", "codecs", value=[{"name": "bytes", "configuration": {"endian": "little"}}]),
    "no checksum": edit("ids/zarr.json", "codecs", value=[{"name": "numcodecs.pcodec", "configuration": {"level": 8}}]),
    "other type": edit("ids/zarr.json", "data_type", value="float32"),
    "large metadata": edit("zarr.json", "attributes", "role", value="x" * (1 << 20)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_members_that_are_not_ours(path: Path, change: str) -> None:
    rezip(path, lambda members: None)
    Container(path).close()
    rezip(path, CHANGES[change])
    with pytest.raises(DamagedCacheError) as caught:
        check(Container(path), chunks_of())
    assert str(path) in str(caught.value)
    assert caught.value.shard == "c.zip"


def test_shorter_sizes_do_not_hide_data(path: Path) -> None:
    rezip(path, edit("zarr.json", "attributes", "sizes", "ids", value=[39, 7, 0, 90]))
    with pytest.raises(DamagedCacheError, match=r"array 'ids', chunk 0 holds data beyond its end$") as caught:
        Container(path).read("ids", 0)
    assert (caught.value.array, caught.value.chunk) == ("ids", 0)


def test_compressed_metadata_is_refused(path: Path) -> None:
    """A few bytes could unpack to gigabytes."""
    rezip(path, lambda members: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(DamagedCacheError, match=r"is compressed or too large"):
        Container(path)


def test_numbers_over_63_bits_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "c.zip"
    write_container(path, [{"ids": np.array([1 << 62])}], {})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    group = zarr.create_group(store=zarr.storage.MemoryStore())
    assert json.loads(members["ids/zarr.json"])["data_type"] == "uint64"
    from zarr.codecs import Crc32cCodec
    from zarr.codecs.numcodecs import PCodec

    array = group.create_array(
        "ids", data=np.array([[1 << 63]], dtype="uint64"), serializer=PCodec(level=8), compressors=[Crc32cCodec()]
    )
    forged = array.store._store_dict["ids/c/0/0"].to_bytes()
    rezip(path, lambda members: members.update({"ids/c/0/0": forged}))
    with pytest.raises(DamagedCacheError, match=r"array 'ids' holds a number over 2\^63 - 1"):
        Container(path).read("ids", 0)


@pytest.mark.parametrize("size", [0, 1, 21, 22, 500, -1, -22])
def test_truncated_files(path: Path, size: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with pytest.raises(DamagedCacheError, match=r"is damaged or not a shard of this format: "):
        Container(path)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(DamagedCacheError, match=r"absent.zip is missing; restore it$"):
        Container(tmp_path / "absent.zip")
    plain = tmp_path / "plain.zip"
    with ZipStore(plain, mode="w") as store:
        group = zarr.create_group(store, attributes={"sizes": {"ids": [3]}})
        group.create_array("ids", data=np.arange(3, dtype="uint16")[None], serializer=BytesCodec())
    with pytest.raises(DamagedCacheError, match=r"is damaged or not a shard of this format"):
        Container(plain)
    with pytest.raises(DamagedCacheError):
        Container(tmp_path)
