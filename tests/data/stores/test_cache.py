"""The node's cache: every page is fetched once, and what is read is right whoever is killed, damaged or evicted."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.corpus import Corpus
from millrace.data.reader import ShardReader
from millrace.data.stores import cache, node
from millrace.data.stores.base import Blob, StoreError, open_blob
from millrace.data.stores.cache import PAGE, CachedBlob, cached
from millrace.data.stores.node import Folder
from millrace.data.stores.waiting import stalls

MIB = 2**20
DATA = random.Random(3).randbytes(20 * MIB + 12345)


class Memory(Blob):
    """Bytes, and the ranges that were read of them."""

    def __init__(self, data: bytes, version: str = "1") -> None:
        self.url, self.size, self._data, self._version = "memory://x", len(data), data, version
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, length: int) -> bytes:
        self.check_range(start, start + length)
        self.reads.append((start, length))
        return self._data[start : start + length]

    def version(self) -> str:
        return self._version

    def close(self) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "cache", 64 * MIB)


def entries(folder: Folder) -> list[Path]:
    return sorted(p for p in Path(folder.root, "entries").rglob("*") if p.is_file())


def leftovers(folder: Folder) -> list[Path]:
    return list(Path(folder.root, "writing").iterdir())


def used(root: str) -> int:
    """Bytes of all entries, however quickly they come and go."""
    total = 0
    for part in Path(root, "entries").iterdir():
        for entry in os.scandir(part):
            try:
                total += entry.stat().st_size
            except FileNotFoundError:
                continue
    return total


def test_contiguous_missing_pages_are_one_request(folder: Folder) -> None:
    remote = Memory(DATA)
    blob = CachedBlob(remote, folder)
    assert blob.read(10 * MIB + 5, 10) == DATA[10 * MIB + 5 :][:10]
    assert remote.reads == [(10 * MIB, PAGE)]
    assert blob.read(0, len(DATA)) == DATA
    assert remote.reads[1:] == [(0, 8 * MIB), (8 * MIB, 2 * MIB), (11 * MIB, 8 * MIB), (19 * MIB, MIB + 12345)]
    assert blob.read(MIB - 3, 2 * MIB) == DATA[MIB - 3 :][: 2 * MIB] and blob.read(len(DATA), 0) == b""
    assert len(remote.reads) == 5 and len(entries(folder)) == 21 and leftovers(folder) == []
    assert folder._sum() == used(folder.root) == len(DATA) + 21 * 8
    with pytest.raises(StoreError, match="20983865 bytes"):
        blob.read(len(DATA) - 1, 2)


@settings(max_examples=60)
@given(st.data())
def test_any_reads_equal_the_bytes(data: st.DataObject) -> None:
    """Pages of 16 bytes, a limit that holds some of them or all, versions that change, pages that are damaged."""
    size = data.draw(st.integers(0, 400))
    versions = {name: random.Random(f"{name}{size}").randbytes(size) for name in "ab"}
    limit = data.draw(st.sampled_from([17, 60, 150, 2000]))
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "PAGE", 16)
        patch.setattr(cache, "_RUN", 3)
        folders = [Folder(root, limit) for _ in range(2)]
        for _ in range(data.draw(st.integers(1, 12))):
            folder = data.draw(st.sampled_from(folders))
            version = data.draw(st.sampled_from("ab"))
            blob = cached(Memory(versions[version], version), folder)
            assert isinstance(blob, CachedBlob)
            start = data.draw(st.integers(0, size))
            length = data.draw(st.integers(0, size - start))
            assert blob.read(start, length) == versions[version][start : start + length]
            assert used(root) <= limit and leftovers(folder) == []
            damage = data.draw(st.sampled_from(["none", "none", "flip", "cut", "remove", "forget"]))
            if damage == "forget":
                blob.forget()
            for path in entries(folder) if damage != "none" else []:
                content = bytearray(path.read_bytes())
                content[0] ^= 1
                path.unlink()  # a new file: pages that this process found sound once are not looked at again
                if damage != "remove":
                    path.write_bytes(content if damage == "flip" else content[:-1])
                    folders = [Folder(root, limit) for _ in range(2)]


def test_a_small_read_of_a_page_is_a_read_of_that_much(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = CachedBlob(Memory(DATA), folder)
    blob.read(0, 10)
    blob.read(0, 10)  # reads all of the page once, to verify it
    asked: list[int] = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, at: asked.append(count) or real(fd, count, at))
    assert blob.read(5, 10) == DATA[5:15] and asked == [10]


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "swap"])
def test_a_damaged_page_is_fetched_again(harm: str, folder: Folder) -> None:
    remote = Memory(DATA[: 2 * MIB])
    CachedBlob(remote, folder).read(0, 2 * MIB)
    first, second = entries(folder)
    content = first.read_bytes()
    harmed = {
        "flip": content[:999] + bytes([content[999] ^ 1]) + content[1000:],
        "cut": content[:-9],
        "empty": b"",
        "swap": second.read_bytes(),
    }
    first.write_bytes(harmed[harm])
    again = CachedBlob(remote, Folder(folder.root, folder.limit))  # as another process would
    assert again.read(900, 2000) == DATA[900:2900]
    assert remote.reads == [(0, 2 * MIB), (0, MIB)] and first.read_bytes() == content


def test_least_recently_used_pages_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_TOUCH", -1.0)
    folder = Folder(tmp_path / "cache", 10 * (MIB + 8))
    remote = Memory(DATA)
    blob = CachedBlob(remote, folder)
    for page in range(10):
        blob.read(page * MIB, 1)
        time.sleep(0.002)  # the clock of a file system ticks every few milliseconds
    blob.read(0, 1)
    blob.read(3 * MIB, 1)
    blob.read(10 * MIB, 1)  # beyond the limit
    kept = [int(path.name.split("-")[1], 16) for path in entries(folder)]
    assert kept == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert folder._sum() == used(folder.root) <= folder.limit


def test_forgotten_pages_are_fetched_again(folder: Folder) -> None:
    remote, other = Memory(DATA[:MIB]), Memory(DATA[:MIB], "2")
    blob, kept = CachedBlob(remote, folder), CachedBlob(other, folder)
    blob.read(0, 5), kept.read(0, 5)
    blob.forget()
    assert len(entries(folder)) == 1 and folder._sum() == MIB + 8
    blob.read(0, 5), kept.read(0, 5)
    assert (len(remote.reads), len(other.reads)) == (2, 1)


def test_blobs_without_versions_and_caches_without_room_are_left_out(tmp_path: Path) -> None:
    blob = Memory(DATA[:100], "")
    assert cached(blob, Folder(tmp_path / "a", "1 GiB")) is blob
    blob = Memory(DATA[:100])
    assert cached(blob, Folder(tmp_path / "b", 0)) is blob


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = shutil.disk_usage(tmp_path)
    assert 0.4 * space.free < Folder(tmp_path / "x").limit < 0.6 * space.free
    monkeypatch.setenv("MILLRACE_CACHE_SIZE", "200 GiB")
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "named"))
    assert (Folder().limit, Folder().root) == (200 * 2**30, str(tmp_path / "named"))
    assert Folder(limit="3 MiB").limit == 3 * MIB
    monkeypatch.setenv("MILLRACE_CACHE_SIZE", "plenty")
    with pytest.raises(ValueError, match="plenty"):
        Folder()


def test_an_unwritable_folder_is_said_once_and_read_without(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = Folder(tmp_path / "file" / "cache", 64 * MIB)
    remote = Memory(DATA)
    blob = CachedBlob(remote, folder)
    for at in range(5):
        assert blob.read(at * 1000, 10) == DATA[at * 1000 :][:10]
    assert remote.reads == [(at * 1000, 10) for at in range(5)]  # and not whole pages
    assert capfd.readouterr().err.count("cannot be written") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_said_once_and_read_without(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Folder(small_disk / "cache", 64 * MIB)
    remote = Memory(DATA)
    blob = CachedBlob(remote, folder)
    assert blob.read(0, len(DATA)) == DATA and blob.read(0, 3 * MIB) == DATA[: 3 * MIB]
    assert capfd.readouterr().err.count("No space left on device") == 1
    assert leftovers(folder) == [] and 0 < len(entries(folder)) < 4
    folder._off_until = 0.0
    (small_disk / "cache/entries").rename(small_disk / "gone")
    shutil.rmtree(small_disk / "gone")
    assert blob.read(0, 2 * MIB) == DATA[: 2 * MIB] and len(entries(folder)) == 2  # there is room again


def test_a_folder_that_is_removed_while_in_use(folder: Folder) -> None:
    blob = CachedBlob(Memory(DATA), folder)
    blob.read(0, 10)
    shutil.rmtree(folder.root)
    assert blob.read(0, 2 * MIB) == DATA[: 2 * MIB] and len(entries(folder)) == 2


def test_threads_fetch_each_page_once(folder: Folder) -> None:
    remote = Memory(DATA)
    blob = CachedBlob(remote, folder)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda at: blob.read(at, 70_000), random.Random(0).choices(range(0, len(DATA) - 70_000), k=300)))
    assert sum(length for _, length in remote.reads) <= len(DATA)


# What other processes do: read all pages in an order of their own and compare; stop at the end.
READER = """
import random, sys, time
from concurrent.futures import ThreadPoolExecutor
from millrace.data.stores.base import open_blob
url, seed, threads, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
data = open(sys.argv[5], "rb").read()
draw, blob = random.Random(seed), open_blob(url)
places = [draw.randrange(len(data) - 3000) for _ in range(rounds)] if rounds else list(range(0, len(data), 2**20))
draw.shuffle(places)
print("ready", flush=True)
def check(at):
    assert blob.read(at, min(3000, len(data) - at)) == data[at : at + 3000], at
with ThreadPoolExecutor(threads) as pool:
    list(pool.map(check, places))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a reader of `url`; killed at the end of the test if need be."""
    (tmp_path / "data").write_bytes(DATA)
    started: list[subprocess.Popen[str]] = []

    def run(url: str, seed: int, threads: int = 4, rounds: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", READER, url, *map(str, (seed, threads, rounds)), str(tmp_path / "data")]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def test_processes_fetch_each_page_once(server: Any, start: Callable[..., subprocess.Popen[str]]) -> None:
    server.files["/x"], server.latency = DATA, 0.01
    readers = [start(f"{server.url}/x", seed) for seed in range(3)]
    assert [reader.wait(60) for reader in readers] == [0, 0, 0]
    spans = sorted(tuple(map(int, asked.removeprefix("bytes=").split("-"))) for asked in server.ranges())
    assert [spans[0][0], *(stop + 1 for _, stop in spans)] == [*(start for start, _ in spans), len(DATA)]


def test_eviction_while_others_read(
    server: Any, start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.files["/x"] = DATA
    monkeypatch.setenv("MILLRACE_CACHE_SIZE", "6 MiB")
    readers = [start(f"{server.url}/x", seed, rounds=150) for seed in range(3)]
    largest = 0
    while any(reader.poll() is None for reader in readers):
        if (tmp_path / "cache/entries").is_dir():
            largest = max(largest, used(str(tmp_path / "cache")))
        time.sleep(0.002)
    assert [reader.wait() for reader in readers] == [0, 0, 0]
    assert 3 * MIB < largest <= 6 * MIB
    assert len(server.log) > 50  # it was too small, and pages were fetched again


def test_a_killed_fetch_leaves_no_lock_and_no_page(
    server: Any, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    server.files["/x"] = DATA
    server.fault = lambda number, path: "stall" if 1 <= number <= 4 else ""
    reader = start(f"{server.url}/x", 0)
    while len(server.log) < 5:
        time.sleep(0.01)
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    before = time.monotonic()
    with open_blob(f"{server.url}/x") as blob:
        assert blob.read(0, len(DATA)) == DATA
    assert time.monotonic() - before < 5
    assert leftovers(cache.node_cache()) == []


def test_killed_at_any_moment(server: Any, start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    server.files["/x"] = DATA
    draw = random.Random(5)
    for seed in range(8):
        reader = start(f"{server.url}/x", seed)
        assert reader.stdout and reader.stdout.readline() == "ready\n"
        time.sleep(draw.random() * 0.04)
        reader.kill()
        reader.wait()
        folder = Folder()
        assert leftovers(folder) == []
        for path in entries(folder):
            key, _, number = path.name.partition("-")
            length = min(MIB, len(DATA) - int(number, 16) * MIB)
            found = folder.read(key, int(number, 16), length, (0, length))
            assert found == DATA[int(number, 16) * MIB :][:MIB]
        if seed % 3 == 2:
            shutil.rmtree(folder.root)
    assert open_blob(f"{server.url}/x").read(0, len(DATA)) == DATA


def test_leftovers_are_removed_unless_somebody_writes_them(folder: Folder) -> None:
    for key in ("aa", "bb"):
        Path(folder.writing(key, 1)).write_bytes(b"half")
    Path(folder.root, "writing/.nfs0001").write_bytes(b"not ours")
    with folder.locked("aa", range(1, 2)) as held:
        assert held
        Folder(folder.root)
    assert sorted(p.name for p in leftovers(folder)) == [".nfs0001", "aa-000001"]


def test_a_suspended_holder_does_not_stop_others(
    server: Any, start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/x"] = DATA
    server.fault = lambda number, path: "stall" if number == 1 else ""
    reader = start(f"{server.url}/x", 0, 1)
    while len(server.log) < 2:
        time.sleep(0.01)
    reader.send_signal(signal.SIGSTOP)
    page = int(server.ranges()[0].removeprefix("bytes=").split("-")[0])
    monkeypatch.setattr(cache, "_WAIT", 0.3)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(open_blob(f"{server.url}/x").read, page, 10)
        time.sleep(0.2)
        assert f"{server.url}/x (bytes {page} to {page + MIB}, which another reader" in stalls(0)[0]
        assert found.result() == DATA[page : page + 10]
    assert server.ranges()[-1] == f"bytes={page}-{page + 9}"


def test_another_version_is_another_blob(server: Any) -> None:
    server.files["/x"] = DATA[:MIB]
    assert open_blob(f"{server.url}/x").read(0, 5) == DATA[:5]
    server.files["/x"], server.etag = DATA[1 : MIB + 1], lambda path: '"two"'
    assert open_blob(f"{server.url}/x").read(0, 5) == DATA[1:6]
    server.log.clear()
    assert open_blob(f"{server.url}/x").read(0, MIB) == DATA[1 : MIB + 1]
    assert server.ranges() == []


def test_a_sample_that_differs_is_read_from_the_store(server: Any, corpora: SimpleNamespace, tmp_path: Path) -> None:
    """A page that is sound by its own checksum, but not what was prepared: `ShardReader` drops it."""
    documents = corpora.make_documents(20)
    path = corpora.prepare_documents(tmp_path / "corpus", documents)
    shard = Path(json.loads((path / "manifest.json").read_text())["shards"][0]["url"])
    content = (tmp_path / "corpus/documents.jsonl").read_bytes()
    server.files["/documents.jsonl"] = content
    text = (path / "manifest.json").read_text().replace(json.dumps(str(shard)), f'"{server.url}/documents.jsonl"')
    (path / "manifest.json").write_text(text)
    reader, samples = ShardReader(Corpus.load(str(path))), np.arange(20)
    blob = open_blob(f"{server.url}/documents.jsonl")
    folder, key = cache.node_cache(), cache.key_of(blob)
    with folder.locked(key, range(1)):
        folder.add(key, 0, content.replace(b"fox", b"cat"))
    assert blob.read(0, len(content)) != content
    found = reader.read(samples)
    assert [content["text"] for content in found] == documents  # type: ignore[index]
    assert len(server.ranges()) == 1
