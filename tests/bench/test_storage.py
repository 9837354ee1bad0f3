"""`logitcache bench storage` on a tiny teacher: everything is measured, and measured right."""

from __future__ import annotations

import numpy as np
import pytest

from logitcache.bench import Measurement, StorageOptions, measure_storage
from logitcache.bench.yardstick import Yardstick
from logitcache.errors import UsageError
from logitcache.selection import Selection
from logitcache.store import open_cache
from logitcache.teachers import TransformersTeacher
from tests.caches import Dumped

SPECS = ("top-k:50", "sample:25", "sample:9:0.8", "varopt:12", "top-p:0.9:40")


@pytest.fixture(scope="module")
def options(dumped: Dumped, tmp_path_factory: pytest.TempPathFactory) -> StorageOptions:
    return StorageOptions(
        teacher=str(dumped.teacher),
        corpus=(str(dumped.corpus),),
        max_tokens=1024,
        block_length=32,
        selections=SPECS,
        positions=128,
        folder=tmp_path_factory.mktemp("bench"),
    )


@pytest.fixture(scope="module")
def lines(options: StorageOptions) -> list[Measurement]:
    return measure_storage(options)


def test_every_variant_and_peer_is_there(lines: list[Measurement]) -> None:
    ours = [f"{layout}, {container}" for container in ("zarr", "arrow") for layout in ("small", "fast")]
    for spec in SPECS:
        found = [line.layout for line in lines if line.selection == spec]
        assert found[:4] == ours
        assert found[4:7] == ["int32 + fp16", "Parquet zstd", "17 + 7 bits"]
    assert [line.layout for line in lines if line.selection == "top-k:50"][7:] == ["DistillKit budget"]
    for line in lines:
        assert line.encode_rate > 0
        assert line.decode_rate > 0
        assert line.divergence > -1e-7


def test_bytes_are_those_of_the_files(options: StorageOptions, lines: list[Measurement]) -> None:
    assert options.folder is not None
    for line in (line for line in lines if line.side_bytes is not None):
        root = options.folder / line.selection.replace(":", "-") / line.layout.replace(", ", "-")
        files = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        assert line.total_bytes == pytest.approx(files / 1024)
        assert line.entry_bytes + line.side_bytes < line.total_bytes
        assert line.ids_per_token == pytest.approx(np.diff(open_cache(root).read_blocks(0, 32).targets.offsets).mean())


def test_sampling_errors(lines: list[Measurement]) -> None:
    """Counts are exact; 50 of 300 ids with their tail come close to everything; samples lie between."""
    small = {line.selection: line for line in lines if line.layout == "small, zarr"}
    assert small["sample:25"].divergence == pytest.approx(0, abs=1e-9)
    assert 0 < small["top-k:50"].divergence < 2e-4
    for spec in ("sample:25", "varopt:12"):
        assert 0 < small[spec].gradient.angle < 90
        assert 0 < small[spec].gradient.relative_variance < 100


def test_running_again_finds_the_caches(options: StorageOptions, lines: list[Measurement]) -> None:
    assert options.folder is not None
    before = {path: path.stat().st_mtime_ns for path in options.folder.rglob("*.zarr.zip")}
    again = measure_storage(options)
    assert {path: path.stat().st_mtime_ns for path in options.folder.rglob("*.zarr.zip")} == before
    assert [line.total_bytes for line in again] == [line.total_bytes for line in lines]


def test_all_ids_give_the_full_gradient(dumped: Dumped) -> None:
    """The yardstick itself: the whole distribution has no error, and more draws have less."""
    teacher = TransformersTeacher.load(dumped.teacher, dtype="float32")
    yardstick = Yardstick(teacher, open_cache(dumped.top_k).read_blocks(0, 4).tokens)
    whole = yardstick.gradient_error(yardstick.select(Selection.parse("top-k:300")))
    assert whole.angle < 0.1
    assert whole.relative_variance < 1e-5
    few, many = (yardstick.gradient_error(yardstick.select(Selection("sample", draws))) for draws in (8, 512))
    # Variance falls with the number of draws: 64 times as many, up to chance.
    assert many.relative_variance < few.relative_variance / 20


def test_wrong_positions() -> None:
    with pytest.raises(UsageError, match=r"^100 positions are no multiple of the block length, 512; choose"):
        StorageOptions(teacher="x", corpus=("y",), positions=100)
