"""Where a cache is: in a folder of this machine, or below a prefix in a bucket of an S3 endpoint."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.request import url2pathname

from logitcache.errors import UsageError

# A Path has made one slash of two. One letter is no scheme: it may be a drive or a folder.
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+", re.ASCII)
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]", re.ASCII)


@dataclass(frozen=True)
class S3Location:
    """`s3://bucket/prefix`; the prefix has no slash at either end and may be empty."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def key(self, name: str) -> str:
        """The key of an object below the prefix."""
        return f"{self.prefix}/{name}" if self.prefix else name


def parse_location(location: str | Path) -> Path | S3Location:
    """A folder (a path or a file:// URL) or a place in a bucket.

    Raises:
        UsageError: another scheme, or no bucket or prefix that can be.
    """
    text = str(location)
    found = URL.match(text)
    if found is None and "://" not in text:
        return Path(text)
    scheme = found[1].lower() if found else text.partition("://")[0]
    if scheme == "file":
        return Path(url2pathname(text[len("file:") :].removeprefix("//")))
    if found is None or scheme != "s3":
        raise UsageError(f"{text} cannot be used: {scheme}:// is not supported; give a folder, file:// or s3://")
    bucket, _, prefix = text[found.end() :].partition("/")
    prefix = prefix.rstrip("/")
    parts = prefix.split("/") if prefix else []
    usual = all(part.isprintable() and part not in ("", ".", "..") and "::" not in part for part in parts)
    if not BUCKET.fullmatch(bucket) or not usual:
        raise UsageError(f"{text} names no place in a bucket; write s3://bucket/prefix")
    return S3Location(bucket, prefix)


def local_root(location: str | Path) -> Path:
    """The folder of a path or file:// URL. Raises UsageError for anything remote."""
    place = parse_location(location)
    if isinstance(place, S3Location):
        raise UsageError(
            f"{place} is remote, and this needs a folder; copy it with `logitcache pull {place} FOLDER`, once it "
            "is finished"
        )
    return place


def refuse_url(root: Path) -> None:
    """Raise UsageError when something new would be written to a URL."""
    if URL.match(str(root)):
        url = URL.sub(r"\1://", str(root), count=1)
        raise UsageError(f"{url} cannot be written to directly; give a folder (`logitcache push` copies a cache there)")


def cache_home() -> Path:
    """`$LOGITCACHE_HOME`, else `$XDG_CACHE_HOME/logitcache`, else `~/.cache/logitcache`."""
    if home := os.environ.get("LOGITCACHE_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logitcache"
