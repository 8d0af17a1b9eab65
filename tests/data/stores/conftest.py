"""Servers on loopback: one that fails as it is told to, S3 by moto, nginx; and a cache folder of the test's own."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from millrace.data.stores import cache, hub, remote, waiting
from millrace.data.stores.waiting import Patience

QUICK = Patience(stall=0.4, deadline=3.0, unknown=1.5, pause=0.005, longest_pause=0.02)


class FaultyServer(ThreadingHTTPServer):
    """Serves `files` by range; `fault(number, path)` names what goes wrong with request `number`, or is ""."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.files: dict[str, bytes] = {}
        self.fault: Callable[[int, str], str] = lambda number, path: ""
        self.etag: Callable[[str], str] = lambda path: '"one"'
        self.latency = 0.0
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.lock = threading.Lock()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.server_port}"
        threading.Thread(target=lambda: self.serve_forever(0.02), daemon=True).start()

    def ranges(self) -> list[str]:
        """What was asked for, but for the first byte that opening a file asks for."""
        return [h["range"] for _, _, h in self.log if h.get("range", "bytes=0-0") != "bytes=0-0"]

    def handle_error(self, request: object, client_address: object) -> None:
        pass

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: the second would wait 40 ms for an ACK
    server: FaultyServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            number = len(self.server.log)
            self.server.log.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        time.sleep(self.server.latency)
        what, _, detail = self.server.fault(number, self.path).partition(" ")
        if what.isdigit():
            self.answer(int(what), b"", **({"Location" if what[0] == "3" else "Retry-After": detail} if detail else {}))
        elif what == "reset":
            # SO_LINGER of zero seconds: the connection is reset, not closed
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif what == "html":
            self.answer(200, b"<html><title>Sign in</title></html>", Content_Type="text/html")
        else:
            self.serve(what)

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def serve(self, what: str) -> None:
        data = self.server.files.get(self.path.partition("?")[0])
        if data is None:
            return self.answer(404, b"")
        span = self.headers.get("Range")
        if what == "whole":
            span = None
        start, stop = 0, len(data)
        if span:
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data))
            if start >= len(data):
                return self.answer(416, b"", Content_Range=f"bytes */{len(data)}")
        body = data[start:stop]
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", self.server.etag(self.path))
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        if span:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.body(what, body)

    def body(self, what: str, body: bytes) -> None:
        if what == "stall":
            self.wfile.write(body[: len(body) // 2])
            time.sleep(1.5)
        elif what in ("cut", "tear"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if what == "tear":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif what == "slow":
            for at in range(0, len(body), len(body) // 8 + 1):
                self.wfile.write(body[at : at + len(body) // 8 + 1])
                time.sleep(0.1)
        elif what == "flip":
            self.wfile.write(bytes([*body[:-1], body[-1] ^ 1]))
        else:
            self.wfile.write(body)


@pytest.fixture
def quick() -> Patience:
    """Patience of a few seconds."""
    return QUICK


@pytest.fixture
def serve() -> Iterator[Callable[..., FaultyServer]]:
    """Start a server; stopped at the end of the test."""
    with contextlib.ExitStack() as stack:

        def start(tls: ssl.SSLContext | None = None) -> FaultyServer:
            server = FaultyServer(tls)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def server(serve: Callable[..., FaultyServer]) -> FaultyServer:
    return serve()


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of the test's own, no credentials or proxies of whoever runs it, nothing kept from other tests."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MILLRACE_CACHE_SIZE", raising=False)
    _forget()
    yield
    _forget()


def _forget() -> None:
    for kept in (cache.node_cache, remote.object_store, hub.commit_of, hub._file_system):
        kept.cache_clear()
    waiting._answered.clear()


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """An S3 server of moto."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], str]:
    """Puts an object into a fresh bucket, and returns its URL; the environment leads to it."""
    urllib.request.urlopen(urllib.request.Request(f"{moto_url}/moto-api/reset", method="POST"))
    urllib.request.urlopen(urllib.request.Request(f"{moto_url}/mill", method="PUT"))
    values = {"ENDPOINT_URL": moto_url, "ALLOW_HTTP": "true", "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)

    def put(key: str, data: bytes) -> str:
        from obstore.store import S3Store

        S3Store("mill", client_options={"allow_http": True}).put(key, data)
        return f"s3://mill/{key}"

    return put
