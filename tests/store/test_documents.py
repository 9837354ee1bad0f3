"""plan.json, commit records and manifest.json: versions, and documents no writer of ours made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from logitcache.errors import CacheError, DamagedCacheError, FormatVersionError
from logitcache.store import Manifest, load_document, open_cache, verify
from logitcache.store.files import checked_json, read_checked_json
from logitcache.store.layout import Layout
from tests.store.caches import Made, identity, make_cache, rewrite
from tests.store.mutations import repair_fingerprint


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_cache(tmp_path / "cache")


def test_round_trip(made: Made) -> None:
    path = Layout(made.root).manifest
    manifest = load_document(path, Manifest)
    assert manifest.identity == identity()
    assert manifest.complete
    assert path.read_bytes() == checked_json(manifest.model_dump(mode="json"))


def test_a_newer_format_asks_for_an_upgrade(made: Made) -> None:
    layout = Layout(made.root)
    rewrite(layout.manifest, format_version=2, something_new={"a": 1})
    for act in (open_cache, verify):
        with pytest.raises(FormatVersionError, match=r"has format version 2, this logitcache reads up to 1; upgrade"):
            act(made.root)
    layout.manifest.unlink()
    rewrite(layout.plan, format_version=9)
    with pytest.raises(FormatVersionError, match=r"plan.json has format version 9, .* upgrade logitcache$"):
        open_cache(made.root, partial=True)


@pytest.mark.parametrize("version", [0, -1, 1.5, "1", None])
def test_versions_that_never_were(made: Made, version: Any) -> None:
    rewrite(Layout(made.root).manifest, format_version=version)
    with pytest.raises(DamagedCacheError, match=r"is not a valid manifest.json: format_version"):
        open_cache(made.root)


@pytest.mark.parametrize("codec", [{"name": "ngram", "order": 2}, {"name": "counts"}, {}])
def test_an_unknown_codec_asks_for_an_upgrade(made: Made, codec: dict[str, Any]) -> None:
    from logitcache.store.schema import Plan

    manifest = load_document(Layout(made.root).manifest, Manifest)
    plan = Plan(identity=manifest.identity.model_copy(update={"codec": codec}))
    rewrite(
        Layout(made.root).manifest,
        identity=plan.identity.model_dump(mode="json"),
        fingerprint=Manifest.fingerprint_of(plan, manifest.codebook_sha256, manifest.shards),
    )
    with pytest.raises(FormatVersionError, match=r"is unknown to this version; upgrade logitcache$"):
        open_cache(made.root)


def test_a_manifest_that_contradicts_itself(made: Made) -> None:
    manifest = Layout(made.root).manifest
    rewrite(manifest, fingerprint="0" * 64)
    with pytest.raises(
        DamagedCacheError,
        match=r"manifest.json contradicts itself: its fingerprint is not that of its content; restore the file$",
    ):
        open_cache(made.root)


@pytest.mark.parametrize(
    "name", ["../evil.zip", "/etc/passwd", "a/b.zip", "..", ".hidden", "", "a" * 300, "a\x00b", "a\\b", "http://x/y", 7]
)
def test_file_names_that_are_paths(made: Made, name: Any) -> None:
    manifest = Layout(made.root).manifest
    shards = json.loads(manifest.read_text())["shards"]
    rewrite(manifest, shards=[{**shards[0], "file": name}, *shards[1:]])
    with pytest.raises(DamagedCacheError, match=r"is not a valid manifest.json: shards.0.file: "):
        open_cache(made.root)
    assert not verify(made.root).ok


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_tokens", 0),
        ("num_tokens", 1 << 70),
        ("num_tokens", 103.0),
        ("block_length", 1),
        ("block_length", (1 << 24) + 1),
        ("block_length", "5"),
        ("chunk_blocks", -3),
        ("unit_blocks", None),
        ("surprise", 1),
    ],
)
def test_geometries_out_of_range(made: Made, field: str, value: Any) -> None:
    manifest = Layout(made.root).manifest
    stored = json.loads(manifest.read_text())["identity"]
    rewrite(manifest, identity={**stored, "geometry": {**stored["geometry"], field: value}})
    with pytest.raises(DamagedCacheError, match=rf"is not a valid manifest.json: identity.geometry.{field}: "):
        open_cache(made.root)


# Tokens of a cache of one shard in chunks of one block of two tokens, what its line claims, and the answer.
HUGE: dict[str, tuple[int, dict[str, int], str]] = {
    "chunks": (1 << 40, {}, "unit 000000 claims more chunks than its bytes can hold"),
    "chunks and bytes": (1 << 40, {"num_bytes": 1 << 60}, "it claims more than 4,194,304 chunks"),
    "entries": (40, {"num_entries": 65_535 * 40 + 1}, "unit 000000 claims more entries than its rows can have"),
}


@pytest.mark.parametrize("case", HUGE)
def test_huge_claims_are_refused_before_anything_is_listed(made: Made, case: str) -> None:
    """In a manifest that is right to the last checksum."""
    num_tokens, claims, message = HUGE[case]
    path = Layout(made.root).manifest
    manifest = load_document(path, Manifest)
    geometry = {"num_tokens": num_tokens, "block_length": 2, "chunk_blocks": 1, "unit_blocks": num_tokens // 2}
    shard = {**manifest.shards[0].model_dump(), "num_tokens": num_tokens, "num_blocks": num_tokens // 2, **claims}
    rewrite(path, identity={**manifest.identity.model_dump(), "geometry": geometry}, shards=[shard])
    repair_fingerprint(path)
    with pytest.raises(DamagedCacheError, match=rf"manifest.json contradicts itself: {message}; restore the file$"):
        open_cache(made.root)


def test_a_plan_of_a_trillion_units(made: Made) -> None:
    """Its commits are looked for where they are, not counted through."""
    layout = Layout(made.root)
    layout.manifest.unlink()
    stored = json.loads(layout.plan.read_text())["identity"]
    huge = {"num_tokens": 1 << 45, "block_length": 5, "chunk_blocks": 1, "unit_blocks": 1}
    rewrite(layout.plan, identity={**stored, "geometry": huge})
    with pytest.raises(DamagedCacheError, match=r"000000.json belongs to another cache or unit"):
        open_cache(made.root, partial=True)
    for path in layout.commits.iterdir():
        path.unlink()
    assert open_cache(made.root, partial=True).chunks == []


SHAPES = {
    "nothing": b"",
    "no JSON": b"{'a': 1}",
    "no UTF-8": b'{"a": "\xff"}',
    "half": b'{"a": 1, "checksum": "',
    "a list": b"[]",
    "a number": b"3",
    "no checksum": b'{"kind": "logitcache-manifest"}',
    "checksum of another type": b'{"a": 1, "checksum": 5}',
    "deep": b"[" * 200_000 + b"]" * 200_000,
    "deep object": b'{"a":' * 200_000,
    "huge integer": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_no_checked_json(made: Made, shape: str) -> None:
    Layout(made.root).manifest.write_bytes(SHAPES[shape])
    with pytest.raises(DamagedCacheError, match=r"manifest.json is damaged: .*; restore the file$"):
        open_cache(made.root)
    assert [problem.what for problem in verify(made.root).problems]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_no_json(tmp_path: Path, value: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(f'{{"a": {value}, "checksum": "0"}}')
    with pytest.raises(DamagedCacheError, match=r"it is not a checksummed JSON object"):
        read_checked_json(path)
    with pytest.raises(ValueError, match=r"not JSON compliant"):
        checked_json({"a": float(value.replace("Infinity", "inf"))})


def test_a_number_that_overflows(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1e999, "checksum": "0"}')
    with pytest.raises(DamagedCacheError):
        read_checked_json(path)


def test_duplicate_keys(tmp_path: Path) -> None:
    """Readers disagree on which one counts, so neither does, also where the checksum suits one of them."""
    path = tmp_path / "x.json"
    good = checked_json({"a": 1, "b": {"c": 2}}).decode()
    path.write_text(good)
    assert read_checked_json(path) == {"a": 1, "b": {"c": 2}}
    for doubled in (good.replace('"a": 1', '"a": 5, "a": 1'), good.replace('"c": 2', '"c": 3, "c": 2')):
        path.write_text(doubled)
        with pytest.raises(DamagedCacheError, match=r"it is not a checksummed JSON object"):
            read_checked_json(path)


def test_a_document_over_64_mb(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(DamagedCacheError, match=r"is over 64 MB, which no manifest.json is; restore"):
        read_checked_json(path)


def test_a_document_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    for name, reason in (("x.json", "Is a directory"), ("y.json", "No such file or directory")):
        with pytest.raises(CacheError, match=rf"{name} cannot be read: {reason}; check"):
            read_checked_json(tmp_path / name)


def test_a_commit_of_another_unit(made: Made) -> None:
    layout = Layout(made.root)
    layout.commit(1).write_bytes(layout.commit(0).read_bytes())
    assert "belongs to another cache or unit; restore the right file" in verify(made.root).problems[0].what
