"""Reads over HTTP from a server that fails: either the right bytes, or an error that says what happened."""

from __future__ import annotations

import datetime
import ipaddress
import os
import random
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from millrace.data.stores.base import StoreError
from millrace.data.stores.http import HttpBlob
from millrace.data.stores.waiting import Patience, stalls

DATA = random.Random(0).randbytes(300_000)


@pytest.fixture
def url(server: Any) -> str:
    server.files["/a"] = DATA
    return f"{server.url}/a"


def test_reads_by_range(server: Any, url: str, quick: Patience) -> None:
    with HttpBlob(url, patience=quick) as blob:
        assert (blob.size, blob.version(), blob.url, blob.path()) == (len(DATA), '"one"', url, None)
        assert blob.read(0, len(DATA)) == DATA
        assert blob.read(1000, 5) == DATA[1000:1005] and blob.read(len(DATA), 0) == b""
        with blob.open() as file:
            assert file.seek(-4, 2) and file.read() == DATA[-4:]
    assert server.ranges()[:2] == [f"bytes=0-{len(DATA) - 1}", "bytes=1000-1004"]
    for start, length in ((-1, 3), (0, len(DATA) + 1), (len(DATA), 1)):
        with pytest.raises(StoreError, match=f"has {len(DATA)} bytes"):
            blob.read(start, length)


def test_an_empty_file(server: Any, quick: Patience) -> None:
    server.files["/empty"] = b""
    blob = HttpBlob(f"{server.url}/empty", patience=quick)
    assert (blob.size, blob.read(0, 0)) == (0, b"")


# (fault, requests between two faults)
FAULTS = [(fault, 20) for fault in ("500", "502", "503", "429", "429 0", "408", "reset", "tear", "cut")]


@pytest.mark.parametrize(("fault", "every"), FAULTS, ids=[fault for fault, _ in FAULTS])
def test_a_fault_in_twenty_requests_is_overcome(fault: str, every: int, server: Any, url: str, quick: Patience) -> None:
    blob = HttpBlob(url, patience=quick)
    server.fault = lambda number, path: fault if number % every == 1 else ""
    places = [(at, 2000) for at in range(0, len(DATA) - 2000, 2000)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: blob.read(*place), places))
    assert found == [DATA[at : at + 2000] for at, _ in places]
    assert len(server.log) > len(places) + 5


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("500", "500 Internal Server Error"),
        ("429", "429 Too Many Requests"),
        ("reset", "reset|aborted"),
        ("tear", "got 0 of 1000 bytes|reset"),
        ("cut", "bytes"),
        ("stall", "timed out"),
    ],
)
def test_a_server_that_always_fails(fault: str, why: str, server: Any, url: str) -> None:
    patience = Patience(stall=0.1, deadline=0.8, pause=0.005, longest_pause=0.02)
    blob = HttpBlob(url, patience=patience)
    server.fault = lambda number, path: fault
    before = time.monotonic()
    with pytest.raises(StoreError, match=rf"cannot read {url} \(bytes 0 to 1000\): .*({why}).*; tried \d+ times in"):
        blob.read(0, 1000)
    assert time.monotonic() - before < patience.deadline + 0.5
    assert len(server.log) > 5


def test_a_stalled_read_is_made_again_and_listed_meanwhile(server: Any, url: str, quick: Patience) -> None:
    blob = HttpBlob(url, patience=quick)
    server.fault = lambda number, path: "stall" if number in (1, 2) else ""
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.append(str(blob.read(0, 1000) == DATA[:1000])))
    reader.start()
    while reader.is_alive() and len(seen) < 2:
        time.sleep(0.02)
        seen += stalls(0.6)[:1]
    reader.join()
    assert seen[-1] == "True"
    assert seen[0].startswith(f"{url} (bytes 0 to 1000), for 1 s (attempt 1: got")
    assert stalls(0) == []


def test_a_slow_body_is_waited_for(server: Any, url: str) -> None:
    server.fault = lambda number, path: "slow" if number else ""
    blob = HttpBlob(url, patience=Patience(stall=0.5, deadline=5))
    assert blob.read(0, 8000) == DATA[:8000]  # takes longer than a stall may


def test_a_body_slower_than_the_deadline_is_not(server: Any, url: str) -> None:
    server.fault = lambda number, path: "slow" if number else ""
    blob = HttpBlob(url, patience=Patience(stall=0.5, deadline=0.3))
    with pytest.raises(StoreError, match="tried 1 times"):
        blob.read(0, len(DATA))


def test_the_store_says_how_long_to_wait(server: Any, url: str, quick: Patience) -> None:
    blob = HttpBlob(url, patience=quick)
    server.fault = lambda number, path: "503 1" if number == 1 else ""
    before = time.monotonic()
    assert blob.read(0, 10) == DATA[:10]
    assert time.monotonic() - before >= 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_will_not_pass_is_not_tried_again(status: int, server: Any, url: str, quick: Patience) -> None:
    server.fault = lambda number, path: str(status)
    with pytest.raises(StoreError, match=f"cannot read {url}: {status} "):
        HttpBlob(url, patience=quick)
    assert len(server.log) == 1


@pytest.mark.parametrize("data", [DATA, DATA[:-1], DATA + b"x", DATA[:50]])
def test_a_file_that_changed_is_an_error(data: bytes, server: Any, url: str, quick: Patience) -> None:
    blob = HttpBlob(url, patience=quick)
    server.files["/a"] = data
    server.etag = lambda path: '"one"' if data is not DATA else '"two"'
    with pytest.raises(StoreError, match="changed after it was opened"):
        blob.read(100, 200)


def test_a_server_without_ranges(server: Any, url: str, quick: Patience) -> None:
    server.fault = lambda number, path: "whole"
    with pytest.raises(StoreError, match="does not serve byte ranges"):
        HttpBlob(url, patience=quick)


def test_a_host_that_is_not_there(quick: Patience) -> None:
    with pytest.raises(StoreError, match=r"http://127.0.0.1:1/x.*refused.*tried"):
        HttpBlob("http://127.0.0.1:1/x", patience=quick)


@pytest.mark.parametrize("url", ["http://", "https:///x", "http://user:secret@host/x", "http://[::bad/x"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        HttpBlob(url)
    assert "secret" not in str(caught.value)


def test_redirects_are_followed_and_headers_stay_at_home(serve: Any, quick: Patience) -> None:
    front, store = serve(), serve()
    store.files["/signed"] = DATA
    front.fault = lambda number, path: f"302 {store.url}/signed?{number}"
    blob = HttpBlob(f"{front.url}/a", {"Authorization": "Bearer secret"}, quick)
    assert blob.read(0, 100) == DATA[:100] and blob.read(5, 100) == DATA[5:105]
    assert [h.get("authorization") for _, _, h in front.log] == ["Bearer secret"]  # later reads go to where it led
    assert [h.get("authorization") for _, _, h in store.log] == [None] * 3
    store.fault = lambda number, path: "403" if path.endswith("?0") else ""  # the first signature is over
    assert blob.read(7, 100) == DATA[7:107]
    assert [path for _, path, _ in store.log][-2:] == ["/signed?0", "/signed?1"]


def test_redirects_without_end(server: Any, url: str, quick: Patience) -> None:
    server.fault = lambda number, path: "302 /a"
    with pytest.raises(StoreError, match="redirects more than 5 times"):
        HttpBlob(url, patience=quick)


def test_a_redirect_to_a_file_of_this_machine(server: Any, url: str, quick: Patience) -> None:
    server.fault = lambda number, path: "302 file:///etc/hostname"
    with pytest.raises(StoreError, match="not a URL of http"):
        HttpBlob(url, patience=quick)


def test_the_environments_proxy(server: Any, monkeypatch: pytest.MonkeyPatch, quick: Patience) -> None:
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//user:secret@"))
    server.files["http://data.invalid/a"] = DATA
    assert HttpBlob("http://data.invalid/a", patience=quick).read(3, 4) == DATA[3:7]
    assert server.log[0][2]["proxy-authorization"].startswith("Basic ")
    server.files["/a"] = DATA
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert HttpBlob(f"{server.url}/a", patience=quick).read(3, 4) == DATA[3:7]
    assert server.log[-1][1] == "/a"


def test_connections_are_used_again(server: Any, url: str, quick: Patience) -> None:
    from millrace.data.stores import http

    http._pool.cache_clear()
    blob = HttpBlob(url, patience=quick)
    for _ in range(5):
        blob.read(0, 1000)
    (pool,) = http._pool(None, os.getpid()).pools._container.values()
    assert (pool.num_connections, pool.num_requests) == (1, 6)


def test_certificates_are_checked(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: Patience) -> None:
    from millrace.data.stores import http

    certificate = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = serve(context)
    server.files["/a"] = DATA
    with pytest.raises(StoreError, match="(?i)certificate"):
        HttpBlob(f"{server.url}/a", patience=quick)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    http._pool.cache_clear()
    assert HttpBlob(f"{server.url}/a", patience=quick).read(0, 9) == DATA[:9]
    http._pool.cache_clear()


def self_signed(folder: Path) -> Path:
    """Key and certificate of 127.0.0.1 in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    path = folder / "self-signed.pem"
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + made.public_bytes(pem))
    return path
