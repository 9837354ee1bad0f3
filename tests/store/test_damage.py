"""Damaged, exchanged and missing files of a cache: an error that names the place, never other data."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from logitcache.errors import CacheError, DamagedCacheError, LogitcacheError
from logitcache.store import Report, open_cache, verify
from logitcache.store.container import open_container
from logitcache.store.container_arrow import BUFFERS_PER_PLANE, ArrowContainer
from logitcache.store.container_zarr import ZarrContainer
from logitcache.store.flatbuffer import record_batch
from logitcache.store.layout import Layout
from tests.faults import flip_bit, random_bits
from tests.store.caches import CONTAINERS, Made, make_cache, rewrite

FLIPS = {"shards": 150, "codebook": 80, "manifest.json": 80, "plan.json": 30, "commits": 30}


@pytest.fixture(scope="module", params=CONTAINERS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_cache(tmp_path_factory.mktemp("original") / "cache", container=request.param)


def layout_of(made: Made) -> Layout:
    return Layout(made.root, open_cache(made.root, partial=True).manifest.identity.container)


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    return original.copy(tmp_path / "cache")


def shard_paths(made: Made) -> list[Path]:
    return sorted(Layout(made.root).shards.iterdir())


def read_or_raise(made: Made, *, partial: bool = False) -> bool:
    """True: everything was read and is right. False: a LogitcacheError said why not."""
    try:
        blocks = open_cache(made.root, partial=partial).read_blocks(0, 21)
    except LogitcacheError as error:
        message = str(error)
    else:
        made.check(blocks, 0, 21)
        return True
    assert str(made.root) in message
    return False


def place_of(path: Path, name: str, chunk: int) -> int:
    """The place of a byte of one plane's compressed numbers."""
    data, container = path.read_bytes(), open_container(path)
    if isinstance(container, ZarrContainer):
        member = f"{name}/c/{chunk}/0".encode()
        return data.index(member) + len(member) + 3
    assert isinstance(container, ArrowContainer)
    block = container._blocks[chunk]
    begin = block.offset + block.metadata_bytes
    offset, length = record_batch(data[block.offset + 8 : begin], block.body_bytes).buffers[
        BUFFERS_PER_PLANE * list(container.sizes).index(name) + 3
    ]
    return begin + offset + length - 2


def whats(report: Report) -> str:
    return " | ".join(problem.what for problem in report.problems)


# ---------------------------------------------------------------------------------------------- single bits


@pytest.mark.parametrize("part", FLIPS)
def test_flipped_bits(made: Made, part: str) -> None:
    """`verify` reports every one (but a flip that leaves a JSON document's meaning alone); reading never lies."""
    rng = np.random.default_rng(len(part))
    place = made.root / part
    paths = sorted(place.iterdir()) if place.is_dir() else [place]
    for round_, path in enumerate(paths):
        data = path.read_bytes()
        for bit in random_bits(rng, path, FLIPS[part] // len(paths) + (round_ == 0)):
            flip_bit(path, bit)
            whole = read_or_raise(made)
            report = verify(made.root)
            if report.ok:
                assert json.loads(path.read_text()) == json.loads(data), f"bit {bit} of {path.name} went unnoticed"
            if part in ("shards", "codebook", "manifest.json"):
                assert whole == report.ok
            else:
                assert whole, "readers need neither the plan nor the commit records"
            path.write_bytes(data)


@pytest.mark.parametrize("part", ["plan.json", "commits"])
def test_flipped_bits_in_an_unfinished_cache(made: Made, part: str) -> None:
    """Without a manifest, plan and commits are what a reader trusts."""
    Layout(made.root).manifest.unlink()
    assert read_or_raise(made, partial=True)
    path = made.root / part if part == "plan.json" else sorted((made.root / part).iterdir())[1]
    data = path.read_bytes()
    for bit in random_bits(np.random.default_rng(3), path, 25):
        flip_bit(path, bit)
        report = verify(made.root)
        assert read_or_raise(made, partial=True) == report.ok
        if report.ok:
            assert json.loads(path.read_text()) == json.loads(data)
        path.write_bytes(data)


def test_damage_is_located(made: Made) -> None:
    """A flip in one chunk of one array is reported as that, and the other shards stay readable."""
    path = shard_paths(made)[1]
    flip_bit(path, 8 * place_of(path, "counts", 1))
    report = verify(made.root)
    assert [(problem.shard, problem.array, problem.chunk) for problem in report.problems] == [(path.name, "counts", 1)]
    assert (report.ok, report.tokens) == (False, 63)
    cache = open_cache(made.root)
    made.check(cache.read_blocks(0, 8), 0, 8)
    made.check(cache.read_blocks(16, 21), 16, 21)
    with pytest.raises(
        DamagedCacheError, match=r"is damaged: its SHA-256 differs; restore it, or remove it and dump"
    ) as caught:
        cache.read_blocks(7, 9)
    assert caught.value.shard == path.name


# ---------------------------------------------------------------------------------------------- whole files


def test_a_pipe_in_a_shards_place(made: Made) -> None:
    """Not even opened: that would wait for ever."""
    path = shard_paths(made)[1]
    path.unlink()
    os.mkfifo(path)
    assert whats(verify(made.root)) == f"{path} is not a file; remove it and dump again"


def test_a_damaged_codebook_is_one_problem(made: Made) -> None:
    layout_of(made).codebook.unlink()
    assert [problem.array for problem in verify(made.root).problems] == ["codebook"]


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_truncated_shards(made: Made, size: int) -> None:
    path = shard_paths(made)[2]
    path.write_bytes(path.read_bytes()[:size])
    assert [problem.shard for problem in verify(made.root).problems] == [path.name]
    with pytest.raises(DamagedCacheError, match=rf"{path.name} has \d+ bytes, not \d+; restore it, or remove it"):
        open_cache(made.root).read_blocks(20, 21)


def test_a_missing_shard(made: Made) -> None:
    path = shard_paths(made)[0]
    path.unlink()
    assert whats(verify(made.root)) == f"{path} is missing; restore it or dump again"
    with pytest.raises(DamagedCacheError, match=r"is missing; restore it or dump again$"):
        open_cache(made.root).read_blocks(0, 1)
    shutil.rmtree(path.parent)
    assert len(verify(made.root).problems) == 3


def test_a_folder_in_place_of_a_shard(made: Made) -> None:
    path = shard_paths(made)[0]
    path.unlink()
    path.mkdir()
    assert not verify(made.root).ok
    assert not read_or_raise(made)


def test_two_shards_swapped(made: Made) -> None:
    first, second, _ = shard_paths(made)
    first.rename(made.root / "aside")
    second.rename(first)
    (made.root / "aside").rename(second)
    assert {problem.shard for problem in verify(made.root).problems} == {first.name, second.name}
    for start in (0, 8):
        with pytest.raises(DamagedCacheError):
            open_cache(made.root).read_blocks(start, start + 1)


def test_swapped_shards_whose_records_agree(made: Made) -> None:
    """Even with hashes that match, a shard is only read as the unit it says it is."""
    shards = json.loads(Layout(made.root).manifest.read_text())["shards"]
    stored = ("file", "sha256", "num_bytes", "num_entries")
    swapped = [{**shards[0], **{name: shards[1][name] for name in stored}}, *shards[1:]]
    from logitcache.store import Manifest
    from logitcache.store.schema import Plan, Shard

    plan = Plan(identity=open_cache(made.root).manifest.identity)
    codebook = open_cache(made.root).manifest.codebook_sha256
    fingerprint = Manifest.fingerprint_of(plan, codebook, [Shard.model_validate(shard) for shard in swapped])
    rewrite(Layout(made.root).manifest, shards=swapped, fingerprint=fingerprint)
    with pytest.raises(DamagedCacheError, match=r"is a shard of another cache or unit; restore the right file$"):
        open_cache(made.root).read_blocks(0, 1)
    assert not verify(made.root).ok


@pytest.mark.parametrize("part", ["shards", "codebook", "commits", "plan.json", "manifest.json"])
def test_parts_of_another_cache(made: Made, tmp_path: Path, part: str) -> None:
    """The other cache has the same shape and differs in its seed alone."""
    other = make_cache(tmp_path / "other", seed=1, container=layout_of(made).container)
    mine, theirs = made.root / part, other.root / part
    if mine.is_dir():
        for target, source in zip(sorted(mine.iterdir()), sorted(theirs.iterdir()), strict=True):
            shutil.copy(source, target)
    else:
        shutil.copy(theirs, mine)
    report = verify(made.root)
    assert not report.ok
    assert read_or_raise(made) == (part in ("commits", "plan.json"))


def test_a_manifest_of_another_cache_with_its_shards(made: Made, tmp_path: Path) -> None:
    """Other shards beside the right plan, commits and tables: the manifest no longer belongs to them."""
    other = make_cache(tmp_path / "other", seed=1, container=layout_of(made).container)
    for path in shard_paths(other):
        shutil.copy(path, made.root / "shards")
    shutil.copy(Layout(other.root).manifest, Layout(made.root).manifest)
    assert "is not the plan of this manifest" in whats(verify(made.root))
    assert not read_or_raise(made)


def test_a_missing_codebook_or_commit(made: Made) -> None:
    layout = layout_of(made)
    layout.commit(1).unlink()
    assert whats(verify(made.root)) == f"{layout.commits} differs from the manifest's shard list"
    assert read_or_raise(made)
    layout.codebook.unlink()
    assert f"{layout.codebook.name} is missing or differs from the manifest; restore the file" in whats(
        verify(made.root)
    )
    assert not read_or_raise(made)


def test_a_missing_codebook_of_an_unfinished_cache(made: Made) -> None:
    layout = layout_of(made)
    layout.manifest.unlink()
    layout.codebook.unlink()
    assert "is not the table that unit 000000 was encoded with; restore it" in whats(verify(made.root))
    assert not read_or_raise(made, partial=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files(made: Made) -> None:
    for path in (Layout(made.root).manifest, layout_of(made).codebook, shard_paths(made)[0]):
        path.chmod(0)
        with pytest.raises(CacheError):
            open_cache(made.root).read_blocks(0, 1)
        path.chmod(0o644)
