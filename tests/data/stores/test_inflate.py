"""Compressed blobs as files of the cache: the content that other libraries give, in bounded memory, or an error."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.stores.base import StoreError, open_blob
from millrace.data.stores.cache import inflate, node_cache
from millrace.data.stores.node import Folder

MIB = 2**20
DATA = random.Random(4).randbytes(3 * MIB) + b"x" * 5 * MIB
PACK: dict[Any, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
KINDS = pytest.mark.parametrize("kind", PACK)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Any]:
    """A blob of some bytes."""
    (tmp_path / "files").mkdir()

    def run(data: bytes) -> Any:
        path = tmp_path / f"files/{len(list((tmp_path / 'files').iterdir()))}"
        path.write_bytes(data)
        return open_blob(path)

    return run


def kept(tmp_path: Path) -> list[Path]:
    return [p for p in (tmp_path / "cache").rglob("*-*") if p.is_file()]


@KINDS
def test_content_once_per_node(kind: Any, write: Any, tmp_path: Path) -> None:
    blob = write(PACK[kind](DATA))
    with inflate(blob, kind, len(DATA)) as content:
        assert (content.size, content.url, content.path()) == (len(DATA), blob.url, None)
        assert content.read(0, len(DATA)) == DATA and content.read(MIB - 2, 5) == DATA[MIB - 2 : MIB + 3]
        with content.open() as file:
            assert file.seek(-3, 2) and file.read() == DATA[-3:]
    (path,) = kept(tmp_path)
    before = path.stat().st_ino
    assert inflate(blob, kind, len(DATA)).read(5, 5) == DATA[5:10]
    assert kept(tmp_path) == [path] and path.stat().st_ino == before
    assert node_cache()._sum() == len(DATA)


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=200), min_size=1, max_size=4), st.sampled_from(["gz", "zst"]))
def test_members_follow_each_other(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], kind: Any) -> None:
    root = tmp_path_factory.mktemp("members")
    (root / "x").write_bytes(b"".join(PACK[kind](part) for part in parts))
    content = inflate(open_blob(root / "x"), kind, 10_000, Folder(root / "cache", MIB * 64))
    assert content.read(0, content.size) == b"".join(parts)


@KINDS
def test_a_bomb_is_refused(kind: Any, write: Any, tmp_path: Path) -> None:
    blob = write(PACK[kind](bytes(100 * MIB)))
    assert blob.size < MIB
    with pytest.raises(StoreError, match=f"{blob.url} is larger than 4.0 MiB when decompressed"):
        inflate(blob, kind, 4 * MIB)
    assert kept(tmp_path) == [] and node_cache()._sum() == 0


@KINDS
def test_memory_stays_bounded(kind: Any, write: Any, tmp_path: Path) -> None:
    blob = write(PACK[kind](bytes(150 * MIB)))
    code = (
        "import resource, sys, pyarrow\n"
        "from millrace.data.stores.base import open_blob\n"
        "from millrace.data.stores.cache import inflate\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert inflate(open_blob(sys.argv[1]), sys.argv[2], 2**30).size == 150 * 2**20\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, blob.url, kind], capture_output=True, text=True, timeout=100)
    assert int(done.stdout) < 64 * 1024, done.stderr  # KiB


@KINDS
@pytest.mark.parametrize("harm", ["cut", "cut off the checksum", "flip", "garbage behind", "not compressed", "empty"])
def test_damage_is_an_error(kind: Any, harm: str, write: Any, tmp_path: Path) -> None:
    packed = PACK[kind](DATA)
    harmed = {
        "cut": packed[: len(packed) // 2],
        "cut off the checksum": packed[:-3],
        "flip": packed[:5000] + bytes([packed[5000] ^ 1]) + packed[5001:],
        "garbage behind": packed + b"garbage behind",
        "not compressed": DATA,
        "empty": b"",
    }[harm]
    blob = write(harmed)
    with pytest.raises(StoreError, match=blob.url):
        inflate(blob, kind, 100 * MIB)
    assert kept(tmp_path) == []


def test_it_has_to_fit_into_the_cache(write: Any, tmp_path: Path) -> None:
    blob = write(gzip.compress(DATA))
    with pytest.raises(StoreError, match="does not fit into the cache .* of 5.0 MiB.*raise MILLRACE_CACHE_SIZE"):
        inflate(blob, "gz", 2**30, Folder(tmp_path / "cache", 5 * MIB))
    (tmp_path / "in the way").write_text("")
    with pytest.raises(StoreError, match="cannot be written; set MILLRACE_CACHE"):
        inflate(blob, "gz", 2**30, Folder(tmp_path / "in the way" / "cache", 2**30))


def test_evicted_while_open(write: Any, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "cache", 20 * MIB)
    first = inflate(write(gzip.compress(DATA)), "gz", 2**30, folder)
    second = inflate(write(gzip.compress(DATA[::-1])), "gz", 2**30, folder)
    third = inflate(write(gzip.compress(DATA[1:])), "gz", 2**30, folder)
    assert len(kept(tmp_path)) == 2
    assert [blob.read(0, 9) for blob in (first, second, third)] == [DATA[:9], DATA[::-1][:9], DATA[1:10]]


@pytest.mark.parametrize("remote", [False, True])
def test_forgotten_it_is_inflated_again(remote: bool, write: Any, server: Any, tmp_path: Path) -> None:
    server.files["/x.gz"] = gzip.compress(DATA)
    blob = open_blob(f"{server.url}/x.gz") if remote else write(gzip.compress(DATA))
    inflate(blob, "gz", 2**30)
    (path,) = kept(tmp_path)  # of a remote one nothing else is kept
    path.write_bytes(DATA[::-1])
    assert inflate(blob, "gz", 2**30).read(0, 5) == DATA[::-1][:5]
    blob.forget()
    assert kept(tmp_path) == []
    assert inflate(blob, "gz", 2**30).read(0, 5) == DATA[:5]


def test_a_remote_one_is_streamed_in_large_reads(server: Any) -> None:
    packed = gzip.compress(DATA)
    server.files["/x.gz"] = packed
    content = inflate(open_blob(f"{server.url}/x.gz"), "gz", 2**30)
    assert content.read(0, content.size) == DATA and len(server.ranges()) == 1


def test_threads_inflate_once(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from millrace.data.stores import cache

    calls: list[int] = []
    real = cache._write_inflated
    monkeypatch.setattr(cache, "_write_inflated", lambda *a: (calls.append(1), time.sleep(0.1), real(*a))[-1])
    blob = write(gzip.compress(DATA))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: inflate(blob, "gz", 2**30).read(3, 4), range(8)))
    assert found == [DATA[3:7]] * 8 and len(calls) == 1


def test_killed_in_the_middle(server: Any, tmp_path: Path) -> None:
    server.files["/x.gz"] = gzip.compress(random.Random(0).randbytes(12 * MIB), 1)
    server.fault = lambda number, path: "stall" if number == 2 else ""
    code = (
        "import sys; from millrace.data.stores.base import open_blob\nfrom millrace.data.stores.cache import inflate\n"
    )
    code += "inflate(open_blob(sys.argv[1]), 'gz', 2**30)"
    process = subprocess.Popen([sys.executable, "-c", code, f"{server.url}/x.gz"])
    while len(server.log) < 3:
        time.sleep(0.01)
    writing = list((tmp_path / "cache/writing").iterdir())
    process.kill()
    process.wait()
    assert len(writing) == 1
    assert inflate(open_blob(f"{server.url}/x.gz"), "gz", 2**30).size == 12 * MIB
    assert len(kept(tmp_path)) == 1
