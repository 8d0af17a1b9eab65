"""Link-local addresses are refused however they are written, resolved or redirected to."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from millrace.data.stores import http
from millrace.data.stores.base import StoreError, open_blob
from millrace.data.stores.guard import LinkLocal, is_link_local, refuse_link_local
from millrace.data.stores.http import HttpBlob
from millrace.data.stores.remote import ObjectBlob

SPELLINGS = [
    "169.254.169.254",
    "169.254.0.1",
    "169.254.43518",
    "169.16689662",
    "2852039166",
    "0xa9fea9fe",
    "0xA9.0xFE.0xA9.0xFE",
    "0251.0376.0251.0376",
    "025177524776",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "[0:0:0:0:0:ffff:a9fe:a9fe]",
    "[::a9fe:a9fe]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:a9fe:a9fe::1]",
    "[fe80::1]",
    "[FE80::1%25lo]",
    "[febf::1]",
    "[fd00:ec2::254]",
]


@pytest.mark.parametrize("host", SPELLINGS)
def test_every_spelling_is_refused(host: str, quick: Any) -> None:
    for scheme in ("http", "https"):
        with pytest.raises(StoreError, match="refused.*link-local"):
            HttpBlob(f"{scheme}://{host}/latest/meta-data", patience=quick)
    with pytest.raises(StoreError, match="refused.*link-local"):
        open_blob(f"http://{host}:80/x")


@pytest.mark.parametrize("host", SPELLINGS)
def test_a_redirect_to_it_is_not_followed(host: str, server: Any, quick: Any) -> None:
    server.fault = lambda number, path: f"302 http://{host}/latest"
    with pytest.raises(StoreError, match=f"{server.url}/x is refused.*link-local"):
        HttpBlob(f"{server.url}/x", patience=quick)
    assert len(server.log) == 1


def test_a_redirect_that_comes_later_is_not_followed(server: Any, quick: Any) -> None:
    server.files["/x"] = bytes(100)
    blob = HttpBlob(f"{server.url}/x", patience=quick)
    server.fault = lambda number, path: "307 //169.254.169.254/x"
    with pytest.raises(StoreError, match="refused.*link-local"):
        blob.read(0, 10)


def test_a_name_that_resolves_to_it(monkeypatch: pytest.MonkeyPatch, quick: Any) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("169.254.169.254", 0))])
    with pytest.raises(StoreError, match="metadata.example is the link-local address 169.254.169.254"):
        HttpBlob("http://metadata.example/x", patience=quick)


def test_a_name_that_resolves_to_it_only_when_connecting(
    monkeypatch: pytest.MonkeyPatch, server: Any, quick: Any
) -> None:
    monkeypatch.setattr(http, "is_link_local", lambda address: address == "127.0.0.1")
    with pytest.raises(StoreError, match="refused.*link-local"):
        HttpBlob(f"{server.url}/x", patience=quick)
    assert server.log == []  # connected, and nothing was sent


def test_through_a_proxy_too(monkeypatch: pytest.MonkeyPatch, server: Any, quick: Any) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    with pytest.raises(StoreError, match="refused.*link-local"):
        HttpBlob("http://169.254.169.254/x", patience=quick)
    assert server.log == []


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.0.0.1", "8.8.8.8", "::ffff:127.0.0.1", "2001:db8::1"])
def test_others_are_not(address: str) -> None:
    assert not is_link_local(address)
    refuse_link_local(address)


def test_a_name_that_does_not_resolve_passes() -> None:
    refuse_link_local("no.such.host.invalid")
    refuse_link_local("a" * 300)
    with pytest.raises(LinkLocal):
        refuse_link_local("169.254.1.1")


@pytest.mark.parametrize(
    ("scheme", "variable"), [("s3", "AWS_ENDPOINT_URL"), ("gs", "GOOGLE_BASE_URL"), ("az", "AZURE_STORAGE_ENDPOINT")]
)
def test_an_endpoint_is_refused(scheme: str, variable: str, monkeypatch: pytest.MonkeyPatch, quick: Any) -> None:
    monkeypatch.setenv(variable, "https://169.254.169.254")
    with pytest.raises(StoreError, match=f"{variable} is refused"):
        ObjectBlob(f"{scheme}://bucket/key", quick)


def test_the_hubs_endpoint_is_refused() -> None:
    code = (
        "from millrace.data.stores.base import open_blob\n"
        "try: open_blob('hf://datasets/a/b/c')\n"
        "except OSError as error: print(error)"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://169.254.169.254"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "HF_ENDPOINT is refused" in done.stdout, done.stderr


def test_an_object_store_that_redirects_is_not_followed(
    monkeypatch: pytest.MonkeyPatch, serve: Any, quick: Any
) -> None:
    first, second = serve(), serve()
    second.files["/mill/x"] = bytes(10)
    first.fault = lambda number, path: f"302 {second.url.replace('127.0.0.1', 'localhost')}/mill/x"
    for name, value in {"ENDPOINT_URL": first.url, "ALLOW_HTTP": "1", "SKIP_SIGNATURE": "1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(StoreError):
        ObjectBlob("s3://mill/x", quick)
    assert first.log and not second.log
