"""The `zarr` container: its members and metadata, and what is not ours."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from numcodecs.pcodec import PCodec
from zarr.codecs import BytesCodec
from zarr.storage import ZipStore

from logitcache.errors import DamagedCacheError
from logitcache.store import container_zarr
from logitcache.store.container import open_container, write_container
from tests.store.containers import check, chunks_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_container("zarr", tmp_path / "c.zarr.zip", chunks_of(), {"role": "shard"})
    return tmp_path / "c.zarr.zip"


def test_any_zarr_reads_it(path: Path) -> None:
    """The format is Zarr v3, not ours alone; zarr's reader and ours agree on every number."""
    container = open_container(path)
    with ZipStore(path, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        assert set(group) == set(container.sizes)
        for name, sizes in container.sizes.items():
            assert group[name].shape == (4, max(sizes))
            for chunk, size in enumerate(sizes):
                np.testing.assert_array_equal(group[name][chunk, :size], container.read(name, chunk))
                assert not group[name][chunk, size:].any()


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
    "pickled": edit("ids/zarr.json", "codecs", value=[{"name": "numcodecs.pickle"}, {"name": "crc32c"}]),
    "transformed": edit("ids/zarr.json", "storage_transformers", value=[{"name": "x"}]),
    "filled with ones": edit("ids/zarr.json", "fill_value", value=1),
    "Zarr v2": lambda members: members.update({".zgroup": b'{"zarr_format": 2}'}),
    "duplicate keys": lambda members: members.update(
        {"zarr.json": members["zarr.json"][:-1] + b', "node_type": "group"}'}
    ),
    "other type": edit("ids/zarr.json", "data_type", value="float32"),
    "large metadata": edit("zarr.json", "attributes", "role", value="x" * (1 << 20)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_members_that_are_not_ours(path: Path, change: str) -> None:
    rezip(path, lambda members: None)
    open_container(path).close()
    rezip(path, CHANGES[change])
    with pytest.raises(DamagedCacheError) as caught:
        check(open_container(path), chunks_of())
    assert str(path) in str(caught.value)
    assert caught.value.shard == "c.zarr.zip"


def test_shorter_sizes_do_not_hide_data(path: Path) -> None:
    rezip(path, edit("zarr.json", "attributes", "sizes", "ids", value=[39, 7, 0, 90]))
    with pytest.raises(DamagedCacheError, match=r"array 'ids', chunk 0 holds data beyond its end; restore") as caught:
        open_container(path).read("ids", 0)
    assert (caught.value.array, caught.value.chunk) == ("ids", 0)


def test_compressed_metadata_is_refused(path: Path) -> None:
    """A few bytes could unpack to gigabytes."""
    rezip(path, lambda members: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(DamagedCacheError, match=r"is compressed or too large"):
        open_container(path)


def test_numbers_over_63_bits_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr.zip"
    write_container("zarr", path, [{"ids": np.array([1 << 62])}], {})
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
    with pytest.raises(DamagedCacheError, match=r"array 'ids', chunk 0 holds a number over 2\^63 - 1"):
        open_container(path).read("ids", 0)


def test_another_zarr(tmp_path: Path) -> None:
    """Valid Zarr, but not with the codecs of this format."""
    plain = tmp_path / "plain.zarr.zip"
    with ZipStore(plain, mode="w") as store:
        group = zarr.create_group(store, attributes={"sizes": {"ids": [3]}})
        group.create_array("ids", data=np.arange(3, dtype="uint16")[None], serializer=BytesCodec())
    with pytest.raises(DamagedCacheError, match=r"is damaged or not a shard of this format"):
        open_container(plain)


def crc_of(stream: bytes) -> bytes:
    return stream + google_crc32c.value(stream).to_bytes(4, "little")


@pytest.mark.parametrize("count", [0, 1, 89, 91, 1 << 22])
def test_streams_of_another_length(path: Path, count: int) -> None:
    """A stream may claim, and hold, more or less than the array is wide."""
    stream = PCodec(level=8).encode(np.zeros(count, dtype=np.uint32))
    rezip(path, lambda members: members.update({"ids/c/2/0": crc_of(bytes(stream))}))
    with pytest.raises(DamagedCacheError, match=r"array 'ids', chunk 2 (does not hold 90 numbers|cannot be decoded)"):
        open_container(path).read("ids", 2)


@pytest.mark.parametrize("stream", [b"", b"\1", b"pco!", b"pco!" + b"\xff" * 40])
def test_streams_that_are_none(path: Path, stream: bytes) -> None:
    for member in (crc_of(stream), stream):
        rezip(path, lambda members, member=member: members.update({"ids/c/2/0": member}))  # type: ignore[misc]
        with pytest.raises(DamagedCacheError, match=r"array 'ids', chunk 2 "):
            open_container(path).read("ids", 2)


def test_a_member_elsewhere_than_the_directory_says(path: Path) -> None:
    """Two readers of such a zip would see different files."""
    data = path.read_bytes()
    for change in (b"PK\3\5", b"idz/c/2/0"):
        place = data.index(b"ids/c/2/0") - (30 if change.startswith(b"PK") else 0)
        path.write_bytes(data[:place] + change + data[place + len(change) :])
        with pytest.raises(DamagedCacheError, match=r"member ids/c/2/0 is not where the directory says"):
            open_container(path).read("ids", 2)


def test_a_directory_without_measure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_zarr, "MAX_DIRECTORY_BYTES", 600)
    with pytest.raises(DamagedCacheError, match=r"is damaged or not a shard of this format: BadZipFile"):
        open_container(path)
