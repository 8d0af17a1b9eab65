"""HTTP from nginx. With MILLRACE_REQUIRE_NGINX=1 (CI) nothing is skipped."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from millrace.data.stores.base import StoreError, open_blob
from millrace.data.stores.http import HttpBlob
from millrace.data.stores.waiting import Patience

DATA = random.Random(2).randbytes(2_500_000)


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Its URL, the folder that it serves, and its log."""
    spec = importlib.util.spec_from_file_location("local_nginx", Path(__file__).with_name("local_nginx.py"))
    assert spec and spec.loader
    local = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local)
    folder = tmp_path_factory.mktemp("nginx")
    try:
        with local.running(folder) as url:
            yield SimpleNamespace(url=url, files=folder / "files", log=folder / "access.log")
    except local.Unavailable as error:
        assert os.environ.get("MILLRACE_REQUIRE_NGINX", "0") in ("", "0"), error
        pytest.skip(f"no nginx: {error}")


def test_reads_by_range(nginx: SimpleNamespace, quick: Patience) -> None:
    (nginx.files / "a b%é.bin").write_bytes(DATA)
    blob = HttpBlob(f"{nginx.url}/a%20b%25%C3%A9.bin", patience=quick)
    assert blob.size == len(DATA) and blob.version().startswith('"')
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: blob.read(at, 50_000), range(0, len(DATA), 50_000)))
    assert b"".join(parts) == DATA


def test_through_the_cache_each_byte_is_sent_once(nginx: SimpleNamespace, tmp_path: Path) -> None:
    (nginx.files / "once.txt").write_bytes(DATA)
    for _ in range(3):
        with open_blob(f"{nginx.url}/once.txt") as blob, blob.open() as file:
            assert file.read() == DATA
    sent = [line.split()[8:10] for line in nginx.log.read_text().splitlines() if "once.txt" in line]
    assert sum(int(size) for status, size in sent) == len(DATA) + 3  # and one byte for every opening
    assert {status for status, _ in sent} == {"206"}


def test_an_empty_file(nginx: SimpleNamespace, quick: Patience) -> None:
    (nginx.files / "empty").write_bytes(b"")
    assert HttpBlob(f"{nginx.url}/empty", patience=quick).size == 0


def test_a_file_that_was_replaced(nginx: SimpleNamespace, quick: Patience) -> None:
    path = nginx.files / "replaced"
    path.write_bytes(DATA)
    blob = HttpBlob(f"{nginx.url}/replaced", patience=quick)
    path.write_bytes(DATA)
    os.utime(path, (1, 1))
    with pytest.raises(StoreError, match="changed after it was opened"):
        blob.read(0, 100)


def test_what_is_missing(nginx: SimpleNamespace, quick: Patience) -> None:
    with pytest.raises(StoreError, match="404 Not Found"):
        HttpBlob(f"{nginx.url}/missing", patience=quick)


def test_redirects(nginx: SimpleNamespace, quick: Patience) -> None:
    with pytest.raises(StoreError, match="403 Forbidden"):  # the folder itself, which it led to
        HttpBlob(f"{nginx.url}/moved/x", patience=quick)
    with pytest.raises(StoreError, match="link-local"):
        HttpBlob(f"{nginx.url}/away/x", patience=quick)
