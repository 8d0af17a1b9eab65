"""Objects of S3 (moto), and of servers that look like Google's and Azure's and fail."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from millrace.data.stores.base import StoreError, open_blob
from millrace.data.stores.remote import ObjectBlob
from millrace.data.stores.waiting import PATIENCE, Patience, stalls

DATA = random.Random(1).randbytes(300_000)
Put = Callable[[str, bytes], str]


def test_s3_reads_by_range(bucket: Put, quick: Patience) -> None:
    url = bucket("a/b c%20é.bin", DATA)
    with ObjectBlob(url, quick) as blob:
        assert (blob.size, blob.url, blob.path()) == (len(DATA), url, None)
        assert len(blob.version()) == 34  # an MD5 in quotes
        assert blob.read(0, len(DATA)) == DATA and blob.read(7, 9) == DATA[7:16] and blob.read(3, 0) == b""
        with pytest.raises(StoreError, match="300000 bytes"):
            blob.read(299_999, 2)
        with ThreadPoolExecutor(8) as pool:
            assert b"".join(pool.map(lambda at: blob.read(at, 3000), range(0, 300_000, 3000))) == DATA


def test_open_blob_reads_s3_through_the_cache(bucket: Put, tmp_path: Path) -> None:
    blob = open_blob(bucket("x", DATA))
    assert type(blob).__name__ == "CachedBlob" and blob.read(5, 100) == DATA[5:105]
    assert [p.stat().st_size for p in (tmp_path / "cache/entries").rglob("*-*")] == [len(DATA) + 8]


@pytest.mark.parametrize("data", [DATA[::-1], DATA[:10], DATA + b"x"])
def test_an_object_that_was_overwritten_is_an_error(data: bytes, bucket: Put, quick: Patience) -> None:
    blob = ObjectBlob(bucket("x", DATA), quick)
    bucket_put_again(data)
    with pytest.raises(StoreError, match="s3://mill/x changed after it was opened"):
        blob.read(0, 5)


def bucket_put_again(data: bytes) -> None:
    from obstore.store import S3Store

    S3Store("mill", client_options={"allow_http": True}).put("x", data)


@pytest.mark.parametrize("url", ["s3://mill/missing", "s3://nobucket/x"])
def test_what_is_missing_is_said_at_once(url: str, bucket: Put) -> None:
    before = time.monotonic()
    with pytest.raises(StoreError, match=f"{url} (does not exist|may not be read)"):
        ObjectBlob(url)
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "s3://mill/a//b"])
def test_urls_that_are_none(url: str, bucket: Put) -> None:
    with pytest.raises(StoreError, match=url):
        ObjectBlob(url)


def test_plain_http_has_to_be_allowed(bucket: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL is plain HTTP; set AWS_ALLOW_HTTP=true"):
        ObjectBlob("s3://mill/x")


@pytest.fixture(params=["s3", "gs", "az"])
def faulty(request: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """A server that fails, and the URL of its object in each kind of store; read anonymously."""
    environment = {
        "s3": {"AWS_ENDPOINT_URL": server.url, "AWS_ALLOW_HTTP": "true", "AWS_SKIP_SIGNATURE": "true"},
        "gs": {"GOOGLE_BASE_URL": server.url, "GOOGLE_ALLOW_HTTP": "true", "GOOGLE_SKIP_SIGNATURE": "true"},
        "az": {
            "AZURE_STORAGE_ENDPOINT": server.url,
            "AZURE_STORAGE_ACCOUNT_NAME": "miller",
            "AZURE_ALLOW_HTTP": "true",
            "AZURE_SKIP_SIGNATURE": "true",
        },
    }[request.param]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    server.files["/mill/x"] = DATA
    return server, f"{request.param}://mill/x"


@pytest.mark.parametrize("fault", ["500", "429", "503", "reset", "tear", "cut"])
def test_a_fault_in_twenty_requests_is_overcome(fault: str, faulty: tuple[Any, str], quick: Patience) -> None:
    server, url = faulty
    blob = ObjectBlob(url, quick)
    server.fault = lambda number, path: fault if number % 20 == 1 else ""
    with ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(lambda at: blob.read(at, 3000), range(0, 300_000, 3000))) == DATA
    assert len(server.log) > 103
    assert "authorization" not in server.log[-1][2]


@pytest.mark.parametrize(
    ("fault", "why"),
    [("500", "500"), ("429", "429"), ("reset", "."), ("tear", "interrupted"), ("stall", "timeout|body")],
)
def test_a_store_that_always_fails(fault: str, why: str, faulty: tuple[Any, str]) -> None:
    server, url = faulty
    patience = Patience(stall=0.1, deadline=0.8, pause=0.005, longest_pause=0.02)
    blob = ObjectBlob(url, patience)
    server.fault = lambda number, path: fault
    before = time.monotonic()
    with pytest.raises(StoreError, match=rf"cannot read {url} \(bytes 0 to 1000\): .*({why}).*; tried \d+ times in"):
        blob.read(0, 1000)
    assert time.monotonic() - before < 1.5 and len(server.log) > 2


def test_a_stalled_read_is_made_again(faulty: tuple[Any, str], quick: Patience) -> None:
    server, url = faulty
    blob = ObjectBlob(url, quick)
    server.fault = lambda number, path: "stall" if number == 1 else ""
    assert blob.read(0, 1000) == DATA[:1000] and len(server.log) == 3 and stalls(0) == []


def test_an_object_that_changed(faulty: tuple[Any, str], quick: Patience) -> None:
    server, url = faulty
    blob = ObjectBlob(url, quick)
    server.etag = lambda path: '"two"'
    with pytest.raises(StoreError, match="changed after it was opened"):
        blob.read(0, 10)


def test_no_access_is_said_at_once(faulty: tuple[Any, str], quick: Patience) -> None:
    server, url = faulty
    server.fault = lambda number, path: "403"
    with pytest.raises(StoreError, match=f"{url} may not be read.*set (AWS|GOOGLE|AZURE)_"):
        ObjectBlob(url, PATIENCE)
    assert len(server.log) == 1


def test_without_credentials_it_says_which(bucket: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StoreError, match="s3://mill: .*Missing AccessKeyId; set AWS_ACCESS_KEY_ID"):
        ObjectBlob("s3://mill/x")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match="no credentials.*set AWS_ACCESS_KEY_ID.*AWS_SKIP_SIGNATURE"):
        ObjectBlob("s3://mill/x", Patience(unknown=0.3))


def test_a_profile(bucket: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Any, quick: Patience) -> None:
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = profiled\naws_secret_access_key = secret\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.files["/mill/x"] = DATA
    assert ObjectBlob("s3://mill/x", quick).read(0, 3) == DATA[:3]
    assert "Credential=profiled/" in server.log[-1][2]["authorization"]


def test_a_forked_process_is_told_so(bucket: Put) -> None:
    code = (
        "import os\n"
        "from millrace.data.stores.remote import ObjectBlob\n"
        "blob = ObjectBlob('s3://mill/x')\n"
        "if os.fork():\n"
        "    os.wait()\n"
        "else:\n"
        "    try: blob.read(0, 1)\n"
        "    except OSError as error: print(error, flush=True)\n"
        "    os._exit(0)\n"
    )
    bucket("x", DATA)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
    assert "'spawn' or 'forkserver'" in done.stdout, done.stderr
