"""Objects below a prefix in a bucket of any S3 endpoint, through botocore.

botocore finds credentials, region and endpoint where every AWS tool does, and tries again what fails for a moment. Its
clients are plain sockets, so a forked child makes its own and goes on; that is why no library with threads of its own
is used here.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

from logitcache.errors import DamagedCacheError, RemoteError
from logitcache.store.location import S3Location
from logitcache.store.objects import FETCHES, PIECE_BYTES, MissingObject, ObjectChanged, Objects, Source, pause
from logitcache.store.s3_client import code_of, connect, explained, status_of

# Larger files go up in parts of this size.
PART_BYTES = 16 << 20
# Broken connections in a row, with not one byte between them, before a download is given up.
BREAKS = 5
CONTENT_TYPES = {"json": "application/json", "md": "text/markdown; charset=utf-8"}


class _Refused(Exception):
    """An answer that the caller expects; its HTTP status."""


class S3Objects(Objects):
    """Made by `open_objects`; connects at the first request. Threads may share one, and a forked child may go on.

    Raises:
        RemoteError: the endpoint cannot be reached, or refuses.
    """

    def __init__(self, place: S3Location) -> None:
        self.place, self.location = place, str(place)
        # By process: a forked child must not use its parent's sockets, nor close them.
        self._clients: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_clients": {}}

    def stream(self, name: str) -> Iterator[bytes]:
        from botocore.exceptions import BotoCoreError

        count, breaks, version = 0, 0, ""
        while True:
            before = count
            resumed = {"Range": f"bytes={count}-", "IfMatch": version} if count else {}
            try:
                answer = self._call("get_object", name, "read", (404, 412, 416), **resumed)
            except _Refused as error:
                if count:
                    raise ObjectChanged from error
                raise self._missing(name) from error
            version, body = answer["ETag"], answer["Body"]
            try:
                for piece in body.iter_chunks(PIECE_BYTES):
                    count += len(piece)
                    yield piece
                return
            except BotoCoreError as error:
                breaks = 1 if count > before else breaks + 1
                if breaks == BREAKS:
                    raise explained(error, self._client(), self.place, name, "read") from error
                pause(breaks)
            finally:
                body.close()

    def size(self, name: str) -> int | None:
        answer = self._head(name)
        return None if answer is None else int(answer["ContentLength"])

    def has(self, name: str, num_bytes: int, sha256: str) -> bool:
        # An object appears whole or not at all, and `put_file`, which writes the hash, checks what arrived.
        answer = self._head(name)
        return answer is not None and (answer["ContentLength"], answer["Metadata"].get("sha256")) == (num_bytes, sha256)

    def put_file(self, name: str, source: Source, num_bytes: int, sha256: str) -> None:
        for failures in range(FETCHES):
            if failures:
                pause(failures)
            if self._sent(name, source, num_bytes, sha256) or self._arrived(name, num_bytes, sha256):
                return
        raise RemoteError(f"{self.url(name)} differs from what was sent, {FETCHES} times; check the network, try again")

    def put(self, name: str, data: bytes) -> None:
        self._call("put_object", name, "written", **_small(name, data))

    def create(self, name: str, data: bytes) -> bool:
        arguments = _small(name, data)
        for failures in range(1, FETCHES + 1):
            try:
                answer = self._call("put_object", name, "written", (409, 412, 501), IfNoneMatch="*", **arguments)
                self._mend(name, data, answer)
                return True
            except _Refused as refused:
                status = refused.args[0]
            if status == 412:
                return False
            if status == 501:  # an endpoint without conditional writes
                if self.size(name) is not None:
                    return False
                self.put(name, data)
                return True
            pause(failures)  # 409: another one is writing it at this moment
        raise RemoteError(f"{self.url(name)} is being written by others all the time; try again later")

    def remove(self, name: str) -> None:
        with suppress(_Refused):
            self._call("delete_object", name, "removed", (403, 404))

    def sizes(self, under: str = "") -> Iterator[tuple[str, int]]:
        for name, found in self._listed(under):
            yield name, found["Size"]

    def clock(self) -> float:
        """The time there, in seconds."""
        answer = self._call("list_objects_v2", "", "listed", Prefix=self.place.key(""), MaxKeys=1)
        said = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return time.time() if said is None else parsedate_to_datetime(said).timestamp()

    def stamps(self, under: str) -> Iterator[tuple[str, float, str]]:
        """Name of each of these objects, when it was written, in seconds by the clock there, and its version.

        What has other bytes has another version.
        """
        for name, found in self._listed(under):
            yield name, found["LastModified"].timestamp(), found["ETag"]

    def _listed(self, under: str) -> Iterator[tuple[str, Any]]:
        start = self.place.key("")
        arguments: dict[str, Any] = {"Prefix": start + under}
        while True:
            answer = self._call("list_objects_v2", "", "listed", **arguments)
            for found in answer.get("Contents", []):
                yield found["Key"].removeprefix(start), found
            if not answer.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = answer["NextContinuationToken"]

    def _client(self) -> Any:
        client = self._clients.get(os.getpid())
        if client is None:
            client = self._clients[os.getpid()] = connect()
        return client

    def _call(self, operation: str, name: str, done: str, expected: Sequence[int] = (), /, **arguments: Any) -> Any:
        """One request. Raises _Refused for an expected status, RemoteError for all others."""
        client = self._client()
        from botocore.exceptions import BotoCoreError, ClientError

        if name:
            arguments["Key"] = self.place.key(name)
        try:
            return getattr(client, operation)(Bucket=self.place.bucket, **arguments)
        except ClientError as error:
            if status_of(error) in expected and code_of(error) != "NoSuchBucket":
                raise _Refused(status_of(error)) from error
            raise explained(error, client, self.place, name, done) from error
        except BotoCoreError as error:
            raise explained(error, client, self.place, name, done) from error

    def _head(self, name: str) -> Any:
        try:
            return self._call("head_object", name, "read", (404,))
        except _Refused:
            return None

    def _missing(self, name: str) -> MissingObject:
        what = f"{self.url(name)} is missing; restore it, or push the cache again"
        return MissingObject(what, shard=name.rpartition("/")[2])

    def _sent(self, name: str, source: Source, num_bytes: int, sha256: str) -> bool:
        """Send a file; whether the endpoint's ETag is the MD5 of what was sent, as with most endpoints."""
        arguments: dict[str, Any] = {
            "Metadata": {"sha256": sha256},
            "ContentType": "application/octet-stream",
        }
        parts = _parts(source, name, num_bytes, sha256)
        if num_bytes <= PART_BYTES:
            (part,) = parts
            answer = self._call("put_object", name, "written", Body=part, **arguments)
            return bool(answer["ETag"].strip('"') == _md5(part).hexdigest())
        upload = {"UploadId": self._call("create_multipart_upload", name, "written", **arguments)["UploadId"]}
        listed, sums = [], b""
        try:
            for number, part in enumerate(parts, start=1):
                sums += _md5(part).digest()
                answer = self._call("upload_part", name, "written", Body=part, PartNumber=number, **upload)
                listed.append({"PartNumber": number, "ETag": answer["ETag"]})
            done: dict[str, Any] = {"MultipartUpload": {"Parts": listed}, **upload}
            answer = self._call("complete_multipart_upload", name, "written", **done)
        except BaseException:
            with suppress(Exception):
                self._call("abort_multipart_upload", name, "written", **upload)
            raise
        return bool(answer["ETag"].strip('"') == f"{_md5(sums).hexdigest()}-{len(listed)}")

    def _mend(self, name: str, data: bytes, answer: Any) -> None:
        """Write an object that was just created once more, where it was changed on its way."""
        for failures in range(1, FETCHES + 1):
            sha256 = hashlib.sha256(data).hexdigest()
            if answer["ETag"].strip('"') == _md5(data).hexdigest() or self._arrived(name, len(data), sha256):
                return
            pause(failures)
            answer = self._call("put_object", name, "written", **_small(name, data))
        raise RemoteError(f"{self.url(name)} differs from what was sent, {FETCHES} times; check the network, try again")

    def _arrived(self, name: str, num_bytes: int, sha256: str) -> bool:
        """Read back what was sent: some endpoints, and encryption with own keys, have ETags of other kinds."""
        found, count = hashlib.sha256(), 0
        for piece in self.stream(name):
            found.update(piece)
            count += len(piece)
        return (count, found.hexdigest()) == (num_bytes, sha256)


def _parts(source: Source, name: str, num_bytes: int, sha256: str) -> Iterator[bytes]:
    """A file in parts of PART_BYTES, the last one handed over only when the whole is what it should be."""
    content, part, count = hashlib.sha256(), bytearray(), 0
    for piece in source.stream(name):
        if len(part) >= PART_BYTES:
            yield bytes(part)
            part.clear()
        content.update(piece)
        count += len(piece)
        part += piece
    if (count, content.hexdigest()) != (num_bytes, sha256):
        what = f"{source.url(name)} is damaged: its size or SHA-256 differs; restore it"
        raise DamagedCacheError(what, shard=name.rpartition("/")[2])
    yield bytes(part)


def _small(name: str, data: bytes) -> dict[str, Any]:
    """What is said of an object that goes up in one request. Its hash, so that `has` knows it."""
    sha256 = hashlib.sha256(data).hexdigest()
    return {"Body": data, "ContentType": _content_type(name), "Metadata": {"sha256": sha256}}


def _md5(data: bytes) -> Any:
    return hashlib.md5(data, usedforsecurity=False)


def _content_type(name: str) -> str:
    return CONTENT_TYPES.get(name.rpartition(".")[2], "application/octet-stream")
