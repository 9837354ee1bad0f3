"""How places of caches are written, and sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from logitcache.errors import UsageError
from logitcache.store.location import S3Location, cache_home, local_root, parse_location, refuse_url
from logitcache.store.remote import node_folder, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cache", Path("cache")),
        ("/a/b c", Path("/a/b c")),
        ("file:///a/b%20c", Path("/a/b c")),
        (Path("file:///a/b"), Path("/a/b")),
        ("s3://bucket", S3Location("bucket", "")),
        ("s3://bucket/", S3Location("bucket", "")),
        ("s3://my.bucket-1/a/b/", S3Location("my.bucket-1", "a/b")),
        # What pathlib makes of a URL.
        (Path("s3://bucket/a"), S3Location("bucket", "a")),
        ("S3://bucket/a b/c=d", S3Location("bucket", "a b/c=d")),
        ("c:/windows", Path("c:/windows")),
    ],
)
def test_places(text: str | Path, expected: Path | S3Location) -> None:
    assert parse_location(text) == expected


@pytest.mark.parametrize(
    "text",
    ["s3://", "s3:///a", "s3://b", "s3://bu cket/a", "s3://bucket/../a", "s3://bucket/a//b", "s3://bucket/a/./b",
     "s3://bucket/zip::file:", "s3://key:secret@bucket/a", "s3://bucket/a\nb"],
)  # fmt: skip
def test_places_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"names no place in a bucket; write s3://bucket/prefix$"):
        parse_location(text)


@pytest.mark.parametrize("text", ["gs://bucket/a", "https://host/a", "simplecache::s3://bucket/a", "ftp://host"])
def test_other_schemes(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not supported; give a folder, file:// or s3://$"):
        parse_location(text)


def test_keys() -> None:
    assert S3Location("bucket", "a/b").key("manifest.json") == "a/b/manifest.json"
    assert S3Location("bucket", "").key("manifest.json") == "manifest.json"
    assert str(S3Location("bucket", "")) == "s3://bucket"


def test_what_needs_a_folder() -> None:
    with pytest.raises(UsageError, match=r"copy it with `logitcache pull s3://bucket/a FOLDER`, once"):
        local_root("s3://bucket/a")
    for url in ("s3://bucket/a", Path("s3://bucket/a")):
        with pytest.raises(UsageError, match=r"^s3://bucket/a cannot be written to directly; give a folder"):
            refuse_url(Path(url))
    refuse_url(Path("a/b:c"))


@pytest.mark.parametrize(
    ("text", "expected"), [("50GB", 50 * 10**9), ("1.5 TiB", 3 << 39), ("1000", 1000), ("7k", 7000), ("2MB", 2 * 10**6)]
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


def test_the_local_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LOGITCACHE_LOCAL_DIR", "LOGITCACHE_LOCAL_SIZE", "LOGITCACHE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_home() == tmp_path / ".cache" / "logitcache"
    assert (node_folder().root, node_folder().max_bytes) == (cache_home() / "remote", 50 * 10**9)
    monkeypatch.setenv("LOGITCACHE_LOCAL_DIR", str(tmp_path / "fast"))
    monkeypatch.setenv("LOGITCACHE_LOCAL_SIZE", "2 TB")
    assert (node_folder().root, node_folder().max_bytes) == (tmp_path / "fast", 2 * 10**12)
    assert (node_folder("here", 5).root, node_folder("here", 5).max_bytes) == (Path("here"), 5)
    monkeypatch.setenv("LOGITCACHE_LOCAL_SIZE", "much")
    with pytest.raises(UsageError, match="LOGITCACHE_LOCAL_SIZE is 'much'; write a size"):
        node_folder()
