"""A real S3 server for tests, and a proxy before it that does what networks and object stores do on bad days."""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fault:
    """What happens to the next `times` requests that `match` ("GET /bucket/key") finds.

    Args:
        match: regular expression.
        times: how often; then requests go through.
        status: answer this, without asking the server.
        after: close the connection after so many bytes of the answer's body.
        short: answer with only so many bytes, as if there were no more.
        flip: invert a bit of this byte of the answer's body.
        flip_sent: invert a bit of this byte of the request's body.
        lose: pass the request on, then close the connection without an answer.
        until: wait for this before passing the request on; with `after`, before closing the connection.
        reached: set when the fault is met; with `after`, when those bytes are sent.
    """

    match: str
    times: int = 1
    status: int = 0
    after: int | None = None
    short: int | None = None
    flip: int | None = None
    flip_sent: int | None = None
    lose: bool = False
    until: threading.Event | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    met: int = 0


@dataclass
class Proxy:
    """A proxy in threads of this process.

    Attributes:
        log: "GET /bucket/key" of each request, in order; behind it the range asked for, or `*` where only a new object
            may be written.
    """

    server_port: int
    port: int = 0
    faults: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, match: str, **what: Any) -> Fault:
        """Add a fault."""
        fault = Fault(match, **what)
        self.faults.append(fault)
        return fault

    def count(self, match: str) -> int:
        """Requests so far that `match` finds."""
        return sum(re.search(match, line) is not None for line in self.log)

    def fault_of(self, line: str) -> Fault | None:
        with self.lock:
            self.log.append(line)
            for fault in self.faults:
                if fault.met < fault.times and re.search(fault.match, line):
                    fault.met += 1
                    return fault
        return None

    def bucket(self, name: str) -> str:
        """Make a bucket; returns its URL."""
        return make_bucket(self.server_port, name)

    def raw(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Ask the server itself, past faults and log: what somebody else does in the bucket."""
        return ask(self.server_port, method, path, body)


def ask(port: int, method: str, path: str, body: bytes | None = None) -> bytes:
    """One request to the server, as somebody."""
    someone = {"Authorization": "AWS4-HMAC-SHA256 Credential=a/20200101/us-east-1/s3/aws4_request, Signature=0"}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, someone)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    assert answer.status in (200, 204), (answer.status, data)
    return data


def make_bucket(port: int, name: str, files: dict[str, bytes] | None = None) -> str:
    """Make a bucket with objects in it; returns its URL."""
    ask(port, "PUT", f"/{name}")
    for file, data in (files or {}).items():
        ask(port, "PUT", f"/{name}/{file}", data)
    return f"s3://{name}"


@contextmanager
def s3_server() -> Iterator[int]:
    """moto's server in a process of its own; its port."""
    command = [sys.executable, "-m", "tests.s3_server"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


@contextmanager
def proxied(server_port: int) -> Iterator[Proxy]:
    """A proxy before the server."""
    proxy = Proxy(server_port)

    class Handler(_Handler):
        pass

    Handler.proxy = proxy
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        proxy.port = server.server_port
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield proxy
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        body = bytearray(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        conditions = f"{self.headers.get('Range', '')} {self.headers.get('If-None-Match', '')}"
        line = f"{self.command} {self.path} {conditions.strip()}".rstrip()
        fault = self.proxy.fault_of(line) or Fault("")
        if fault.after is None:
            fault.reached.set()
            if fault.until is not None:
                fault.until.wait()
        if fault.status:
            text = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>no</Message></Error>"
            name = {503: b"SlowDown", 403: b"AccessDenied", 409: b"ConditionalRequestConflict"}
            return self.answer(fault.status, [], text % name.get(fault.status, b"InternalError"), fault)
        if fault.flip_sent is not None:
            body[fault.flip_sent] ^= 1
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.server_port)
        skipped = ("expect", "connection", "content-length")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
        connection.request(self.command, self.path, bytes(body) or None, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault.lose:
            return self.hang_up()
        headers_back = [
            (name, value)
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "server")
        ]
        return self.answer(answer.status, headers_back, data, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, fault: Fault) -> None:
        if fault.flip is not None:
            data = data[: fault.flip] + bytes([data[fault.flip] ^ 1]) + data[fault.flip + 1 :]
        data = data if fault.short is None else data[: fault.short]
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data if fault.after is None else data[: fault.after])
        self.wfile.flush()
        if fault.after is not None:
            fault.reached.set()
            if fault.until is not None:
                fault.until.wait()
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the other side may be dead
            self.connection.shutdown(socket.SHUT_RDWR)
