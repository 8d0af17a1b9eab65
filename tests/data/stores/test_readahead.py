"""Reading ahead: what a window needs is fetched once, in few requests, of bounded bytes, and nothing depends on it."""

from __future__ import annotations

import io
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data import readahead
from millrace.data.config import DataConfig
from millrace.data.corpus import Corpus
from millrace.data.loader import build_loader
from millrace.data.prepare import PrepareConfig, prepare
from millrace.data.readahead import ReadAhead, read_ahead
from millrace.data.reader import ShardReader
from millrace.data.sources.parquet_footer import ranges_of, read_extents
from millrace.data.sources.recent import Recent
from millrace.data.stores import cache, remote, waiting
from millrace.data.stores.base import Blob
from millrace.data.stores.cache import CachedBlob
from millrace.data.stores.node import Folder

SMALL = 4096  # bytes of a page in these tests


class Memory(Blob):
    """Bytes, which take a moment to come; `most` is how many were under way at once."""

    def __init__(self, data: bytes, seconds: float = 0.0) -> None:
        self.url, self.size, self._data, self._seconds = "memory://x", len(data), data, seconds
        self.flying = self.most = 0
        self._lock = threading.Lock()

    def read(self, start: int, length: int) -> bytes:
        self.check_range(start, start + length)
        with self._lock:
            self.flying += length
            self.most = max(self.most, self.flying)
        time.sleep(self._seconds)
        with self._lock:
            self.flying -= length
        return self._data[start : start + length]

    def version(self) -> str:
        return "1"

    def close(self) -> None:
        pass


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PAGE", SMALL)
    monkeypatch.setattr(readahead, "PAGE", SMALL)


Served = Callable[..., tuple[Path, Path]]


@pytest.fixture
def served(server: Any, tmp_path: Path, corpora: SimpleNamespace) -> Served:
    """Prepares documents as shards of a kind; gives the manifest of the local ones, and of those on the server."""

    def make(kind: str, count: int = 600, shards: int = 3) -> tuple[Path, Path]:
        folder = tmp_path / kind
        folder.mkdir()
        documents = corpora.make_documents(count, longest=40)
        for number in range(shards):
            part, path = documents[number::shards], folder / f"{number}.{kind}"
            corpora.write_jsonl(path, part) if kind == "jsonl" else corpora.write_parquet(path, part, 25)
            server.files[f"/{path.name}"] = path.read_bytes()
        local = tmp_path / f"{kind}-local"
        prepare(PrepareConfig(inputs=[str(folder / f"*.{kind}")], out=str(local), vocab_size=300))
        there = tmp_path / f"{kind}-remote"
        subprocess.run(["cp", "-r", str(local), str(there)], check=True)
        text = (there / "manifest.json").read_text()
        for number in range(shards):
            text = text.replace(f'"{folder}/{number}.{kind}"', f'"{server.url}/{number}.{kind}"')
        (there / "manifest.json").write_text(text)
        return local, there

    return make


def pages_of(server: Any) -> list[tuple[str, int]]:
    """(path, page) of every page that was fetched, with repetitions."""
    found = []
    for _, path, headers in server.log:
        if (asked := headers.get("range", "bytes=0-0")) != "bytes=0-0":
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            assert first % SMALL == 0 and ((last + 1) % SMALL == 0 or last + 1 == len(server.files[path]))
            found += [(path, page) for page in range(first // SMALL, last // SMALL + 1)]
    return found


def finish(reading: ReadAhead) -> None:
    """Wait until nothing more is to be fetched."""
    pool, busy = reading._pool, True
    while busy:
        time.sleep(0.001)
        with pool._shutdown_lock:  # held by whoever submits: a thread is started before it is counted
            busy = bool(pool._work_queue.qsize()) or pool._idle_semaphore._value < len(pool._threads)
    pool.shutdown()


def reader_of(folder: Path) -> ShardReader:
    return ShardReader(Corpus.load(str(folder)))


def test_a_window_takes_its_pages_once_and_no_others(small_pages: None, server: Any, served: Served) -> None:
    """Requests, in closed form: one for each run of neighbouring pages, of at most 8."""
    local, there = served("jsonl")
    reader = reader_of(there)
    samples = np.sort(np.random.default_rng(0).choice(600, 90, replace=False))
    entries, shard = reader.corpus.entries(samples), reader.corpus.shard_of(samples)
    wanted = {
        (f"/{s}.jsonl", page)
        for s, at, extent in zip(shard.tolist(), entries.at.tolist(), entries.extent.tolist(), strict=True)
        for page in range(at // SMALL, (at + extent - 1) // SMALL + 1)
    }
    reading = ReadAhead(reader)
    reading.expect(np.concatenate([samples[::-1], samples]))
    finish(reading)
    assert sorted(pages_of(server)) == sorted(wanted)
    starts = [(path, page) for path, page in wanted if (path, page - 1) not in wanted]
    assert len(starts) <= len(server.ranges()) <= len(starts) + len(wanted) // 8
    server.log.clear()
    assert reader.read(samples) == reader_of(local).read(samples)
    assert server.log == []  # neither pages nor a second opening


def test_of_parquet_only_the_wanted_columns_of_the_row_groups(small_pages: None, server: Any, tmp_path: Path) -> None:
    draw = random.Random(0)  # values of 6,000 bytes are too long for statistics in the footer
    texts = [f"{number} {draw.randbytes(200).hex()}" for number in range(1000)]
    table = pa.table({"text": texts, "other": [draw.randbytes(6000) for _ in texts]})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=100, compression="none")
    prepare(PrepareConfig(inputs=[str(tmp_path / "0.parquet")], out=str(tmp_path / "out"), vocab_size=300))
    server.files["/0.parquet"] = (tmp_path / "0.parquet").read_bytes()
    manifest = tmp_path / "out/manifest.json"
    shard = '"' + str(tmp_path / "0.parquet") + '"'
    assert shard in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(shard, f'"{server.url}/0.parquet"'))
    reader, samples = reader_of(tmp_path / "out"), np.array([5, 7, 320, 399])  # of row groups 0 and 3
    reading = ReadAhead(reader)
    reading.expect(samples)
    finish(reading)
    fetched = len(pages_of(server)) * SMALL
    chunks = sum(
        pq.ParquetFile(tmp_path / "0.parquet").metadata.row_group(g).column(0).total_compressed_size for g in (0, 3)
    )
    assert chunks <= fetched <= chunks + 2**16 + 6 * SMALL < len(server.files["/0.parquet"]) // 10
    server.log.clear()
    assert [content["text"] for content in reader.read(samples)] == [texts[i] for i in samples]  # type: ignore[index]
    assert len(pages_of(server)) <= 3  # a buffer of 4 KiB behind each chunk, and in front of the footer


@settings(max_examples=40)
@given(st.integers(1, 40), st.lists(st.integers(0, 59), min_size=1, max_size=60))
def test_bytes_under_way_are_bounded(limit: int, numbers: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch, SmallFolder() as folder:
        patch.setattr(cache, "PAGE", 100)
        patch.setattr(readahead, "PAGE", 100)
        source = Memory(random.Random(1).randbytes(60 * 100), 0.001)
        blob = CachedBlob(source, folder)
        corpus = SimpleNamespace(manifests=[], samples=1)
        reading = ReadAhead(SimpleNamespace(corpus=corpus), 100 * limit)  # type: ignore[arg-type]
        for number in numbers:
            for run in blob.missing(np.array([[number * 100, 100]])):
                reading._pool.submit(reading._fetch, blob, run)
        finish(reading)
        assert 0 < source.most <= 100 * limit
        assert all(blob.missing(np.array([[n * 100, 100]])) == [] for n in numbers)


class SmallFolder:
    """A cache folder for one example."""

    def __enter__(self) -> Folder:
        import tempfile

        self._kept = tempfile.TemporaryDirectory()
        return Folder(self._kept.name, "64 MiB")

    def __exit__(self, *_: object) -> None:
        self._kept.cleanup()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 300)), max_size=12))
def test_missing_pages_are_those_of_the_ranges(ranges: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch, SmallFolder() as folder:
        patch.setattr(cache, "PAGE", 16)
        blob = CachedBlob(Memory(bytes(1000)), folder)
        kept = [(at, min(length, 1000 - at)) for at, length in ranges]
        found = [page for run in blob.missing(np.array(kept, np.int64).reshape(-1, 2)) for page in run]
        needed = sorted({byte // 16 for at, length in kept for byte in range(at, at + length)})
        assert [page for page in found if page in needed] == needed
        assert len(found) <= len(needed) + sum(length == 0 for _, length in kept)


def batches(folder: Path, steps: int, workers: int = 0, **options: Any) -> list[Any]:
    config = DataConfig(manifest=str(folder), sequence_length=64, window=100, workers=workers, **options)
    found = []
    with build_loader(config, seed=3, batch_rows=4, micro_batch=4, rank=0, world=1) as loader:
        for step in loader:
            found.append((step.micro_batches[0].input_ids_BT.tolist(), np.array(step.spans).tolist()))
            if len(found) == steps:
                return found
    raise AssertionError


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_loader_gives_what_it_gives_of_local_files(
    kind: str, small_pages: None, server: Any, served: Served
) -> None:
    local, there = served(kind)
    server.latency = 0.005
    assert batches(there, 60) == batches(local, 60)
    fetched = pages_of(server)
    assert len(fetched) == len(set(fetched))  # each once, whoever asked
    assert len(server.log) - len(server.ranges()) == 3  # and each shard opened once


def test_two_workers_fetch_each_page_once(server: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 1 MiB in these processes: one for each shard."""
    local, there = served("jsonl")
    server.latency = 0.02
    assert batches(there, 60, workers=2) == batches(local, 60)
    assert len(server.ranges()) == 3


def test_a_cache_too_small_for_it_is_not_filled_ahead(
    small_pages: None, server: Any, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE_CACHE_SIZE", str(8 * (SMALL + 8)))
    local, there = served("jsonl")
    reading = read_ahead(reader_of(there))
    assert reading and reading.needs(30, 16) > reading.room
    assert batches(there, 30) == batches(local, 30)
    reading.close()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nothing_is_asked_for_twice_until_it_is_forgotten(
    small_pages: None, served: Served, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    reading = ReadAhead(reader_of(served(kind)[1]))
    asked: list[int] = []
    monkeypatch.setattr(reading, "_submit", lambda task, number, places: asked.append(len(places)))
    for start in (0, 100):
        reading.expect(np.arange(start, 300))
        assert sum(asked) == (300 if start == 0 else 0)
        asked.clear()
    reading.expect(np.arange(250, 350))
    assert 0 < sum(asked) <= 100  # those that follow, but for pages and row groups that are there
    asked.clear()
    monkeypatch.setattr(readahead, "_ASKED", 1)
    for _ in range(2):
        reading.expect(np.arange(100))
        assert sum(asked) == 100
        asked.clear()
    reading.close()


def test_what_fails_ahead_is_read_again_when_it_is_needed(
    small_pages: None, server: Any, served: Served, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, there = served("jsonl")
    reader, samples, failing = reader_of(there), np.arange(600), True
    for number in reader.corpus.shard_of(samples[::200]).tolist():
        blob = reader.opened(number)[1]
        monkeypatch.setattr(blob.remote, "patience", quick)  # type: ignore[attr-defined]
    server.fault = lambda number, path: "404" if failing else ""
    reading = ReadAhead(reader)
    reading.expect(samples)
    finish(reading)
    assert len(server.ranges()) >= 3
    with pytest.raises(UserError, match="cannot read a shard of the manifest .* 404"):
        reader.read(samples)
    failing = False
    assert reader.read(samples) == reader_of(local).read(samples)


def test_a_stalled_request_is_named_and_does_not_stop_others(
    small_pages: None, server: Any, served: Served, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, there = served("jsonl")
    reader = reader_of(there)
    for number in range(3):
        monkeypatch.setattr(reader.opened(number)[1].remote, "patience", quick)  # type: ignore[attr-defined]
    first, began = len(server.log), time.monotonic()
    server.fault = lambda number, path: "stall" if number == first else ""
    reading = ReadAhead(reader)
    reading.expect(np.arange(600))
    while len(server.log) <= first:
        time.sleep(0.001)
    time.sleep(0.25)
    assert any(str(server.url) in read for read in waiting.stalls(0.2))
    assert len(set(pages_of(server))) >= sum(-(-len(data) // SMALL) for data in server.files.values()) - 8
    reading.close()
    assert time.monotonic() - began < 3
    assert reader.read(np.arange(600)) == reader_of(local).read(np.arange(600))


CONSUMER = """
import sys
from millrace.data.config import DataConfig
from millrace.data.loader import build_loader
config = DataConfig(manifest=sys.argv[1], sequence_length=64, window=100)
with build_loader(config, seed=3, batch_rows=4, micro_batch=4, rank=0, world=1) as loader:
    for step in loader:
        print("step", flush=True)
"""


def test_killed_while_it_reads_ahead(server: Any, served: Served) -> None:
    local, there = served("jsonl")
    server.fault = lambda number, path: "stall" if number >= 3 else ""
    process = subprocess.Popen([sys.executable, "-c", CONSUMER, str(there)], stdout=subprocess.PIPE)
    while not server.ranges():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    server.fault = lambda number, path: ""
    before = time.monotonic()
    assert batches(there, 5) == batches(local, 5)
    assert time.monotonic() - before < 5
    assert list(Path(cache.node_cache().root, "writing").iterdir()) == []


def test_local_shards_and_stores_without_a_cache_are_left_alone(
    server: Any, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, there = served("jsonl")
    assert read_ahead(reader_of(local)) is None
    monkeypatch.setenv("MILLRACE_CACHE_SIZE", "0")
    cache.node_cache.cache_clear()
    reader = reader_of(there)
    reading = ReadAhead(reader)
    reading.expect(np.arange(10))
    finish(reading)
    assert server.ranges() == []


def test_column_chunks_as_pyarrow_has_them(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": [f"text {i % 7}" for i in range(500)],
            "ids": [[i, i + 1] for i in range(500)],
            "image": [{"bytes": b"x" * i, "path": str(i)} for i in range(500)],
            "null": pa.nulls(500),
        }
    )
    for number, options in enumerate(
        ({}, {"use_dictionary": False, "compression": "zstd"}, {"write_page_index": True})
    ):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(table, path, row_group_size=90, **options)  # type: ignore[arg-type]
        extents, metadata = read_extents(Memory(path.read_bytes())), pq.ParquetFile(path).metadata
        assert len(extents) == metadata.num_row_groups == 6
        for group, found in enumerate(extents):
            wanted: dict[str, list[tuple[int, int]]] = {}
            for column in map(metadata.row_group(group).column, range(metadata.num_columns)):
                start = column.dictionary_page_offset or column.data_page_offset
                name = column.path_in_schema.partition(".")[0]
                wanted.setdefault(name, []).append((start, column.total_compressed_size))
            assert found == wanted


@settings(max_examples=300)
@given(st.data())
def test_damaged_footers_are_refused_or_give_ranges_within_the_file(data: st.DataObject) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["some text"] * 50, "x": range(50)}), file, row_group_size=20)
    raw = bytearray(file.getvalue())
    start = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    for at in data.draw(st.lists(st.integers(start, len(raw) - 5), min_size=1, max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    try:
        extents = read_extents(Memory(bytes(raw)))
        ranges = ranges_of(extents, np.arange(5), ["text"], len(raw))
    except ValueError:
        return
    assert (ranges >= 0).all() and (ranges.sum(axis=1) <= len(raw)).all()


def test_threads_that_miss_at_once_make_one() -> None:
    recent: Recent[int] = Recent(4)
    made = []

    def make(value: int) -> int:
        time.sleep(0.01)
        made.append(value)
        if value == 3 and made.count(3) == 1:
            raise ValueError("no")
        return value

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: recent.get("a", lambda: make(1)), range(8))) == [1] * 8
        failed = [pool.submit(recent.get, "b", lambda: make(3)) for _ in range(4)]
        assert sum(isinstance(one.exception(), ValueError) for one in failed) >= 1
    assert made.count(1) == 1 and recent.get("b", lambda: make(3)) == 3
    assert recent.pop("a") == 1 and recent.pop("a") is None


def test_the_buffer_of_a_store_is_not_copied(bucket: Callable[[str, bytes], str]) -> None:
    data = random.Random(0).randbytes(300_000)
    blob = remote.ObjectBlob(bucket("x", data))
    view = blob.view(5, 200_000)
    assert isinstance(view, memoryview) and view == data[5:200_005]
    assert blob.read(5, 200_000) == data[5:200_005] and isinstance(blob.read(5, 20), bytes)
