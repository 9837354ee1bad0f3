"""What every container does: its own content, in reproducible bytes, comes out of it, and nothing else."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.errors import CacheError, DamagedCacheError, TargetsError
from logitcache.store.container import kind_of, open_container, write_container
from logitcache.store.container_file import MAX_METADATA_BYTES, MAX_PLANE_INTEGERS
from logitcache.store.layout import SUFFIXES, ContainerKind
from tests.faults import flip_bit, random_bits
from tests.store.containers import KINDS, check, chunks_of


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def path(kind: ContainerKind, tmp_path: Path) -> Path:
    path = tmp_path / f"c{SUFFIXES[kind]}"
    write_container(kind, path, chunks_of(), {"role": "shard"})
    return path


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 200), min_size=1, max_size=4),
    st.sampled_from([1, 2, 1 << 16, (1 << 16) + 1, 1 << 32, (1 << 32) + 1, (1 << 63) - 1]),
)
def test_planes_come_back(
    tmp_path_factory: pytest.TempPathFactory, kind: ContainerKind, seed: int, sizes: list[int], top: int
) -> None:
    """In the narrowest type that holds them."""
    path = tmp_path_factory.getbasetemp() / f"planes{SUFFIXES[kind]}"
    chunks = chunks_of(seed, tuple(sizes), top)
    if sizes[0]:
        chunks[0]["ids"][0] = top - 1
    write_container(kind, path, chunks, {"role": "shard", "unit": "000001"})
    container = open_container(path)
    assert container.attributes == {"role": "shard", "unit": "000001"}
    check(container, chunks)
    largest = max(int(chunk["ids"].max(initial=0)) for chunk in chunks)
    width = 2 if largest < 1 << 16 else 4 if largest < 1 << 32 else 8
    assert {container.read("ids", chunk).dtype for chunk in range(len(chunks))} == {np.dtype(f"<u{width}")}
    container.close()


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "int32", ">u4"])
def test_planes_of_any_integer_type(kind: ContainerKind, tmp_path: Path, dtype: str) -> None:
    """The type in memory leaves no trace in the file."""
    files = []
    for number, given_type in enumerate((dtype, "int64")):
        path = tmp_path / f"{number}{SUFFIXES[kind]}"
        write_container(kind, path, [{"ids": np.array([5, 0, 60_000 if "16" in dtype else 70_000], given_type)}], {})
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_bytes_are_reproducible(kind: ContainerKind, path: Path, tmp_path: Path) -> None:
    write_container(kind, tmp_path / "again", chunks_of(), {"role": "shard"})
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    write_container(kind, tmp_path / "again", chunks_of(1), {"role": "shard"})
    assert (tmp_path / "again").read_bytes() != path.read_bytes()


NOT_STORED = {
    "negative": ({"ids": np.array([3, -1])}, "^plane 'ids' holds a negative number"),
    "over 2^63 - 1": ({"ids": np.array([1 << 63], dtype="uint64")}, r"'ids' holds 9223372036854775808, which is over"),
    "too long": (
        {"ids": np.broadcast_to(np.zeros(1, "uint16"), MAX_PLANE_INTEGERS + 1)},
        r"^plane 'ids' of a chunk has 67,108,865 numbers, over the format's 67,108,864; use a shorter --block-length$",
    ),
    "too many": (
        {f"p{number}": np.zeros(1, "uint16") for number in range(65)},
        r"^a chunk has 65 planes, over the form",
    ),
    "a path for a name": ({"../ids": np.array([3])}, r"^plane '../ids' needs a name of letters, digits"),
}


@pytest.mark.parametrize("case", NOT_STORED)
def test_what_cannot_be_stored(kind: ContainerKind, tmp_path: Path, case: str) -> None:
    planes, message = NOT_STORED[case]
    with pytest.raises(TargetsError, match=message):
        write_container(kind, tmp_path / "c", [planes], {})


def test_metadata_that_no_reader_would_take_are_not_written(kind: ContainerKind, tmp_path: Path) -> None:
    with pytest.raises(TargetsError, match=r"metadata takes [\d,]+ bytes, over the format's 1,048,576; use fewer"):
        write_container(kind, tmp_path / "c", chunks_of(), {"role": "x" * MAX_METADATA_BYTES})


def test_flipped_bits_without_the_files_hash(path: Path) -> None:
    """Even below the SHA-256, no flipped bit survives as other data or other attributes."""
    original, chunks = path.read_bytes(), chunks_of()
    caught = 0
    for bit in random_bits(np.random.default_rng(1), path, 150):
        flip_bit(path, bit)
        try:
            container = open_container(path)
            check(container, chunks)
            assert container.attributes == {"role": "shard"}
            container.close()
        except CacheError:
            caught += 1
        path.write_bytes(original)
    assert caught > 60, "the rest are bits that mean nothing, such as dates in the zip's directory"


@pytest.mark.parametrize("size", [0, 1, 21, 22, 500, -1, -22])
def test_truncated_files(path: Path, size: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with pytest.raises(DamagedCacheError, match=r"is damaged or not a shard of this format: "):
        open_container(path)


def test_truncated_after_opening(path: Path) -> None:
    """The file is read, not mapped: a shorter one is an error, not a SIGBUS."""
    container = open_container(path)
    os.truncate(path, 100)
    with pytest.raises(DamagedCacheError, match=r"it ends early"):
        container.read("ids", 3)


def test_other_files(kind: ContainerKind, tmp_path: Path) -> None:
    suffix = SUFFIXES[kind]
    with pytest.raises(DamagedCacheError, match=rf"absent{suffix} is missing; restore it$"):
        open_container(tmp_path / f"absent{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(DamagedCacheError, match=r"it is a folder; restore it or dump again$"):
        open_container(tmp_path / f"folder{suffix}")
    other = next(suffix for name, suffix in SUFFIXES.items() if name != kind)
    write_container(kind, tmp_path / f"c{other}", chunks_of(), {})
    with pytest.raises(DamagedCacheError, match=r"is damaged or not a shard of this format"):
        open_container(tmp_path / f"c{other}")


def test_kinds_are_named_by_files() -> None:
    assert kind_of(Path("a/000001-abc.zarr.zip")) == "zarr"
    assert kind_of(Path("000001-abc.arrow")) == "arrow"
    for name in ("000001.zip", "x.pkl", "arrow", "000000.zarr"):
        with pytest.raises(DamagedCacheError, match=r"does not end in .zarr.zip or .arrow; restore the right file$"):
            open_container(Path(name))


def test_threads_share_one_container(path: Path) -> None:
    """Reads carry their own place in the file."""
    container, chunks, failures = open_container(path), chunks_of(), list[BaseException]()

    def read() -> None:
        try:
            for _ in range(30):
                check(container, chunks)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
