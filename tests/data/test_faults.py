"""The loader over stores that fail: the undisturbed stream, or an error that says what to do (docs/data.md, Faults)."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace.core.errors import UserError
from millrace.data import prefetch, workers
from millrace.data.config import DataConfig
from millrace.data.loader import Loader, build_loader
from millrace.data.prepare import PrepareConfig, prepare
from millrace.data.stores import waiting
from tests.data import hasty_worker
from tests.data.stores import conftest as stores

own_environment, serve, server = stores.own_environment, stores.serve, stores.server  # fixtures

HASTE = {"stall": 0.4, "deadline": 4.0, "unknown": 3.0, "pause": 0.005, "longest_pause": 0.02}
STEPS = 20  # an epoch and a part of the next
SHARDS, EACH = 2, 30  # documents of each shard
Step = tuple[tuple[tuple[int, int, int], ...], str]
"""What was consumed in a step: its (sample, start, end), and a hash of its arrays."""


def write_parquet(path: Path, documents: Sequence[str]) -> None:
    table = pa.table({"text": list(documents)})
    pq.write_table(table, path, row_group_size=3, compression="none", write_statistics=False, use_dictionary=False)


def write_jsonl_gz(path: Path, documents: Sequence[str]) -> None:
    lines = "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents)
    path.write_bytes(gzip.compress(lines.encode(), compresslevel=0, mtime=0))


def write_tar(path: Path, documents: Sequence[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, document in enumerate(documents):
            member = tarfile.TarInfo(f"{number:04d}.text")
            member.size = len(document.encode())
            archive.addfile(member, io.BytesIO(document.encode()))


def write_mds(path: Path, documents: Sequence[str]) -> None:
    config = json.dumps(
        {"format": "mds", "version": 2, "column_names": ["text"], "column_encodings": ["str"], "column_sizes": [None]}
    ).encode()
    samples = [struct.pack("<I", len(d.encode())) + d.encode() for d in documents]
    first = 4 * (len(samples) + 2) + len(config)
    places = np.cumsum([first, *map(len, samples)]).astype("<u4")
    path.write_bytes(struct.pack("<I", len(samples)) + places.tobytes() + config + b"".join(samples))


WRITE = {"parquet": write_parquet, "jsonl.gz": write_jsonl_gz, "tar": write_tar, "mds": write_mds}


def load(manifest: Path, workers: int = 0, **more: Any) -> Loader:
    values: dict[str, Any] = {"sequence_length": 48, "window": 10, "shuffle_blocks": 2, "threads": 2, "prefetch": 4096}
    config = DataConfig(manifest=str(manifest), workers=workers, **values | more)
    return build_loader(config, seed=3, batch_rows=6, micro_batch=6, rank=0, world=1)


def step_of(batch: Any) -> Step:
    (micro,) = batch.micro_batches
    digest = hashlib.sha256()
    for tensor in (micro.input_ids_BT, micro.labels_BT, micro.position_ids_BT):
        digest.update(tensor.numpy().tobytes())
    return tuple(span for row in micro.spans for span in row), digest.hexdigest()


def consume(loader: Loader, steps: int = STEPS) -> list[Step]:
    with loader:
        return [step_of(next(loader)) for _ in range(steps)]


class Corpus:
    """A manifest, and its shards in a store, where a test harms them."""

    def __init__(self, made: Path, kind: str, store: str, folder: Path, server: stores.FaultyServer) -> None:
        self.made, self.kind, self.server, self.folder = made, kind, server, folder / "corpus"
        self.base = {"local": f"{folder}/shards", "http": f"{server.url}/mill", "s3": "s3://mill"}[store]
        self._local = folder / "shards" if store == "local" else None
        shutil.copytree(made / "corpus", self.folder)
        (folder / "shards").mkdir()
        record = json.loads((self.folder / "manifest.json").read_text())
        for number, shard in enumerate(record["shards"]):
            shard["url"] = self.url(number)
            self.put((made / self.name(number)).read_bytes(), number)
        (self.folder / "manifest.json").write_text(json.dumps(record))

    def name(self, number: int) -> str:
        return f"{number}.{self.kind}"

    def url(self, number: int = 1) -> str:
        return f"{self.base}/{self.name(number)}"

    def get(self, number: int = 1) -> bytes:
        return (self.made / self.name(number)).read_bytes()

    def put(self, raw: bytes | None, number: int = 1) -> None:
        """Replace a shard; None removes it."""
        if self._local and raw is None:
            (self._local / self.name(number)).unlink()
        elif self._local:
            (self._local / self.name(number)).write_bytes(raw or b"")
        elif raw is None:
            del self.server.files[f"/mill/{self.name(number)}"]
        else:
            self.server.files[f"/mill/{self.name(number)}"] = raw


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpora: Any) -> Callable[[str], Path]:
    """A folder with shards 0 and 1 of `EACH` documents in a format, their manifest, and the same shards reversed."""
    folder, found = tmp_path_factory.mktemp("formats"), {}
    documents = corpora.make_documents(EACH * SHARDS)

    def make(kind: str) -> Path:
        if kind not in found:
            here = folder / kind
            here.mkdir()
            for number in range(SHARDS):
                part = documents[EACH * number : EACH * number + EACH]
                WRITE[kind](here / f"{number}.{kind}", part)
                WRITE[kind](here / f"{number}.other", [d[::-1] for d in part])
            inputs = [f"x={here}/*.{kind}"]
            prepare(PrepareConfig(inputs=inputs, out=str(here / "corpus"), vocab_size=300, text="text"))
            found[kind] = here
        return found[kind]

    return make


@pytest.fixture(scope="module")
def undisturbed(made: Callable[[str], Path]) -> Callable[[str], list[Step]]:
    found: dict[str, list[Step]] = {}

    def stream(kind: str) -> list[Step]:
        if kind not in found:
            found[kind] = consume(load(made(kind) / "corpus"))
            counts = Counter(span for spans, _ in found[kind] for span in spans)
            assert len({sample for sample, _, _ in counts}) == EACH * SHARDS and max(counts.values()) == 2
        return found[kind]

    return stream


@pytest.fixture
def haste(monkeypatch: pytest.MonkeyPatch, own_environment: None) -> Iterator[Callable[..., None]]:
    """Stores of this process and of workers wait briefly; more so when called. Nothing is cached on the node."""
    patience, usual, named = dict(HASTE), asdict(waiting.PATIENCE), waiting.stalls.__defaults__
    every = hasty_worker.worker._REPORT_EVERY

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        script = Path(hasty_worker.__file__)
        return subprocess.Popen([sys.executable, str(script), json.dumps(patience)], **options)

    def change(**more: float) -> None:
        patience.update(more)
        hasty_worker.hurry(patience)

    monkeypatch.setattr(workers, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))
    monkeypatch.setattr(workers, "_PIPE_BYTES", 4096)  # else these small batches are all read ahead
    monkeypatch.setattr(prefetch, "_SAY_AFTER", 0.5)
    monkeypatch.setenv("MILLRACE_CACHE_SIZE", "0")
    change()
    yield change
    hasty_worker.hurry(usual)
    waiting.stalls.__defaults__, hasty_worker.worker._REPORT_EVERY = named, every


@pytest.fixture
def place(
    made: Callable[[str], Path],
    haste: Callable[..., None],
    server: stores.FaultyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, str], Corpus]:
    """Put the shards of a format into a store."""

    def put(kind: str, store: str) -> Corpus:
        values = {"ENDPOINT_URL": server.url, "ALLOW_HTTP": "true", "SKIP_SIGNATURE": "true", "REGION": "us-east-1"}
        for name, value in values.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        if kind == "jsonl.gz":  # is inflated into the cache
            monkeypatch.setenv("MILLRACE_CACHE_SIZE", "64 MiB")
        return Corpus(made(kind), kind, store, tmp_path, server)

    return put


Fault = Callable[[int, str], str]


def every(number: int, *faults: str) -> Fault:
    """One request in `number` fails, in each of these ways by turns."""
    return lambda request, path: faults[request // number % len(faults)] if request % number == 3 else ""


PASSING: dict[str, Fault] = {
    "5% HTTP 500": every(20, "500"),
    "5% HTTP 429": every(20, "429"),
    "resets": every(10, "reset"),
    "torn answers": every(10, "tear", "cut"),
    "a stalled read": every(30, "stall"),
    "a flipped bit on the way": every(10, "flip"),
    "a page in between": lambda request, path: "html" if request % 9 == 8 else "",  # not when a shard is opened
    "all of these": every(4, "500", "429", "reset", "tear", "cut", "flip"),
}


@pytest.mark.parametrize(
    ("fault", "store", "workers"),
    [*((fault, store, 0) for fault in PASSING for store in ("http", "s3")), ("all of these", "http", 2)],
)
def test_what_passes_changes_nothing(
    fault: str, store: str, workers: int, place: Any, undisturbed: Any, server: Any
) -> None:
    corpus = place("parquet", store)
    server.fault = PASSING[fault]
    assert consume(load(corpus.folder, workers)) == undisturbed("parquet")
    assert len(server.log) > 30


@pytest.mark.parametrize("kind", WRITE)
def test_what_passes_changes_nothing_in_any_format(kind: str, place: Any, undisturbed: Any, server: Any) -> None:
    corpus = place(kind, "http")
    server.fault = lambda number, path: ["500", "reset", "", "cut", "", "flip"][number] if number < 6 else ""
    assert consume(load(corpus.folder)) == undisturbed(kind)


@pytest.mark.parametrize("request_number", range(7))
def test_a_compressed_file_that_is_damaged_on_the_way_is_read_once_more(
    request_number: int, place: Any, undisturbed: Any, server: Any
) -> None:
    corpus = place("jsonl.gz", "http")
    server.fault = lambda number, path: "flip" if number == request_number else ""
    assert consume(load(corpus.folder)) == undisturbed("jsonl.gz")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_slow_store(workers: int, place: Any, undisturbed: Any, server: Any) -> None:
    corpus = place("parquet", "http")
    server.latency = 0.01
    server.fault = every(25, "slow")
    assert consume(load(corpus.folder, workers)) == undisturbed("parquet")


PUT_BACK = "put it back or wait for the store, and start again, or run `millrace prepare` into a new folder"
SIZE = r"the shard {url} is not the file that .* was prepared from: size \d+ \(expected \d+\); restore it"
AT_REST: list[tuple[str, Callable[[Corpus], None], str]] = [
    ("truncated", lambda c: c.put(c.get()[:-700]), SIZE),
    ("longer", lambda c: c.put(c.get() + b"\n"), SIZE),
    ("empty", lambda c: c.put(b""), SIZE),
    ("missing", lambda c: c.put(None), "cannot read a shard of the manifest .*{url}.*" + PUT_BACK),
]


@pytest.mark.parametrize("store", ["local", "http", "s3"])
@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize(("harm", "message"), [row[1:] for row in AT_REST], ids=[row[0] for row in AT_REST])
def test_a_shard_that_is_not_whole_stops_the_run(
    harm: Callable[[Corpus], None], message: str, kind: str, store: str, place: Any
) -> None:
    corpus = place(kind, store)
    harm(corpus)
    with pytest.raises(UserError, match=message.format(url=corpus.url())):
        consume(load(corpus.folder))


@pytest.mark.parametrize("store", ["local", "http", "s3"])
@pytest.mark.parametrize("kind", WRITE)
def test_a_shard_replaced_by_one_of_equal_size_stops_the_run(kind: str, store: str, place: Any) -> None:
    corpus = place(kind, store)
    other = (corpus.made / "1.other").read_bytes()
    assert len(other) == len(corpus.get()) and other != corpus.get()
    corpus.put(other)
    why = "is not what was prepared: its checksum differs; the shard was altered or is damaged"
    with pytest.raises(
        UserError, match=rf"11 samples could not be used, .*max_bad_samples = 10 .* of {corpus.url()}: {why}"
    ):
        consume(load(corpus.folder))


@pytest.mark.parametrize(("store", "workers"), [("local", 0), ("http", 0), ("s3", 0), ("http", 2)])
@pytest.mark.parametrize("kind", ["parquet", "tar", "mds"])
def test_a_flipped_bit_leaves_its_sample_empty(
    kind: str, store: str, workers: int, place: Any, made: Any, undisturbed: Any
) -> None:
    corpus = place(kind, store)
    raw = bytearray(corpus.get())
    raw[raw.index(b"naive" if b"naive" in raw else b"quick brown") + 2] ^= 1
    corpus.put(bytes(raw))
    quarantined, steps = [], []
    with load(corpus.folder, workers) as loader:
        for _ in range(STEPS):
            batch = next(loader)
            quarantined += batch.quarantined
            loader.exclude({entry["sample"]: entry["why"] for entry in batch.quarantined})  # as the trainer does
            steps.append(step_of(batch))
    bad = quarantined[0]  # found by each worker, if both are ahead of the trainer
    assert {entry["sample"] for entry in quarantined} == {bad["sample"]} and len(quarantined) <= max(1, workers)
    assert bad["shard"] == corpus.url() and "checksum differs" in bad["why"] and bad["sample"] >= EACH
    for (spans, digest), (expected, whole) in zip(steps, undisturbed(kind), strict=True):
        assert spans == expected and (digest == whole) == (bad["sample"] not in {sample for sample, _, _ in spans})


@pytest.mark.parametrize("store", ["local", "http", "s3"])
def test_a_flipped_bit_in_a_compressed_file_stops_the_run(store: str, place: Any) -> None:
    corpus = place("jsonl.gz", store)
    raw = bytearray(corpus.get())
    raw[2000] ^= 1
    corpus.put(bytes(raw))
    with pytest.raises(UserError, match=f"{corpus.url()} cannot be decompressed: .*{PUT_BACK}"):
        consume(load(corpus.folder))


@pytest.mark.parametrize("store", ["http", "s3"])
def test_a_shard_that_is_replaced_while_the_run_has_it_open_stops_it(store: str, place: Any, server: Any) -> None:
    corpus = place("mds", store)
    loader = load(corpus.folder, window=4, prefetch=0)
    next(loader)
    server.etag = lambda path: '"two"'
    with pytest.raises(UserError, match=f"{corpus.base}/..mds changed after it was opened"):
        consume(loader)


def test_a_shard_that_is_cut_short_while_the_run_has_it_open_stops_it(place: Any) -> None:
    corpus = place("mds", "local")
    loader = load(corpus.folder, window=4, prefetch=0)
    next(loader)
    for number in range(SHARDS):
        corpus.put(corpus.get(number)[:1000], number)
    with pytest.raises(UserError, match=rf"{corpus.base}/..mds ends at byte \d+, .*: it was cut short; {PUT_BACK}"):
        consume(loader)


TRIED = r"\(bytes \d+ to \d+\): .*{}.*; tried \d+ times in [\d.]+ s"
ENDLESS = {  # fault, message
    "HTTP 500": ("500", TRIED.format("500 Internal Server Error")),
    "HTTP 429": ("429", TRIED.format("429 Too Many Requests")),
    "resets": ("reset", TRIED.format("reset by peer")),
    "stalls": ("stall", TRIED.format("(timed out|timeout)")),
    "a page instead of bytes": ("html", TRIED.format("(with text/html, not with the bytes|non-partial response)")),
    "ranges ignored": ("whole", TRIED.format("(not with the bytes|non-partial response)")),
    "no access": ("403", ".*403 Forbidden"),
}


@pytest.mark.parametrize("store", ["http", "s3"])
@pytest.mark.parametrize(("fault", "message"), ENDLESS.values(), ids=list(ENDLESS))
def test_what_does_not_pass_stops_the_run(
    fault: str, message: str, store: str, place: Any, haste: Any, server: Any
) -> None:
    haste(stall=0.2 if fault == "stall" else 2, deadline=0.6, unknown=0.6)
    corpus = place("parquet", store)
    server.fault = lambda number, path: fault if number > 8 else ""
    before = time.monotonic()
    with pytest.raises(UserError, match=rf"cannot read a shard of .*{corpus.base}/..parquet.*{message}.*{PUT_BACK}"):
        consume(load(corpus.folder))
    assert time.monotonic() - before < 6


def test_what_does_not_pass_in_workers_stops_the_run(place: Any, haste: Any, server: Any) -> None:
    haste(stall=2, deadline=0.6, unknown=0.6)
    corpus = place("parquet", "http")
    server.fault = lambda number, path: "500" if number > 8 else ""
    with pytest.raises(UserError, match=rf"cannot read a shard of .*{corpus.base}/..parquet.*500 .*{PUT_BACK}"):
        consume(load(corpus.folder, 2))


@pytest.mark.parametrize(("fault", "message"), [("html", "answers 200 with text/html"), ("whole", "byte ranges")])
def test_a_server_without_ranges_is_refused_at_once(fault: str, message: str, place: Any, server: Any) -> None:
    corpus = place("parquet", "http")
    server.fault = lambda number, path: fault
    with pytest.raises(UserError, match=f"cannot read a shard of .*{corpus.base}/..parquet: .*{message}"):
        consume(load(corpus.folder))
    assert len(server.log) < 5  # a thread each


class Late(stores.FaultyServer):
    """Refuses connections until it is opened."""

    def server_activate(self) -> None:
        pass

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Called by a thread of `FaultyServer`."""
        opened.wait(10)
        super().serve_forever(poll_interval)


opened = threading.Event()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_comes_late(
    workers: int, made: Any, undisturbed: Any, haste: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    late = Late()
    corpus = Corpus(made("parquet"), "parquet", "http", tmp_path, late)

    def come() -> None:
        late.socket.listen(64)
        opened.set()

    timer = threading.Timer(1.5, come)
    timer.start()
    try:
        assert consume(load(corpus.folder, workers)) == undisturbed("parquet")
    finally:
        timer.join()
        late.stop()
        opened.clear()
    said = capfd.readouterr().err
    assert workers or (f"; reading: {corpus.base}/" in said and "Connection refused" in said)  # they start slowly


@pytest.mark.parametrize("store", ["http", "s3"])
def test_a_store_that_takes_the_connection_and_comes_late(
    store: str, place: Any, undisturbed: Any, haste: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may meet a store for the first time while that stalls: it is there, so it is not misspelt."""
    haste(stall=0.4, unknown=0.3, deadline=6)
    monkeypatch.setattr(waiting, "_answered", set())
    server.fault = gate = Gate()
    corpus = place("parquet", store)
    gate.close(1)
    assert consume(load(corpus.folder)) == undisturbed("parquet")


def test_a_store_that_does_not_come(haste: Any, made: Any, tmp_path: Path, server: Any) -> None:
    haste(unknown=0.3)
    corpus = Corpus(made("parquet"), "parquet", "http", tmp_path, server)
    server.stop()
    with pytest.raises(UserError, match=rf"cannot read {corpus.base}/..parquet: .*refused.*; tried \d+ times in 0.. s"):
        consume(load(corpus.folder))


class Gate:
    """A fault that stalls every request from its closing to its opening."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.open()

    def open(self) -> None:
        self._open.set()

    def close(self, seconds: float) -> None:
        self._open.clear()
        threading.Timer(seconds, self.open).start()

    def __call__(self, number: int, path: str) -> str:
        self._open.wait()
        return ""


def settle(server: stores.FaultyServer) -> None:
    """Wait until the prefetch is full: nothing was asked for in half a second."""
    seen = -1
    while seen != len(server.log):
        seen = len(server.log)
        time.sleep(0.5)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("store", ["http", "s3"])
def test_a_stall_is_felt_when_the_prefetch_is_dry_and_then_named(
    store: str, workers: int, place: Any, undisturbed: Any, haste: Any, server: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    haste(stall=10, deadline=20)
    server.fault = gate = Gate()
    corpus, steps, waits = place("parquet", store), [], []
    with load(corpus.folder, workers, prefetch=24_000) as loader:
        steps.append(step_of(next(loader)))
        settle(server)
        gate.close(2.5)
        while len(steps) < STEPS:
            before = time.monotonic()
            steps.append(step_of(next(loader)))
            waits.append(time.monotonic() - before)
    assert steps == undisturbed("parquet")
    ahead = next(i for i, wait in enumerate(waits) if wait > 1)
    assert ahead >= 2 and max(waits) > 1.5
    said = capfd.readouterr().err
    assert f"the prefetched batches are used up, and no new one came for 1 s; reading: {corpus.base}/" in said


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("store", ["http", "s3"])
def test_a_stall_of_a_minute(
    store: str, workers: int, place: Any, undisturbed: Any, haste: Any, server: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    haste(**asdict(waiting.Patience()))  # as users have it
    server.fault = gate = Gate()
    corpus, steps = place("parquet", store), []
    with load(corpus.folder, workers) as loader:
        steps.append(step_of(next(loader)))
        gate.close(60)
        steps += [step_of(next(loader)) for _ in range(STEPS - 1)]
    assert steps == undisturbed("parquet")
    assert f"; reading: {corpus.base}/" in capfd.readouterr().err


def test_a_stall_shorter_than_the_prefetch_is_not_felt(
    place: Any, undisturbed: Any, haste: Any, server: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    haste(stall=10, deadline=20)
    server.fault = gate = Gate()
    corpus, steps = place("parquet", "http"), []
    with load(corpus.folder, prefetch=24_000) as loader:
        steps.append(step_of(next(loader)))
        settle(server)
        gate.close(0.4)
        while len(steps) < STEPS:
            before = time.monotonic()
            steps.append(step_of(next(loader)))
            assert time.monotonic() - before < 0.3
            time.sleep(0.15)  # a step of the trainer
    assert steps == undisturbed("parquet") and "used up" not in capfd.readouterr().err
