"""The parts of benchmarks/data_peers.py that decide what is counted: payloads, object server, metrics, meters."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import io
import itertools
import math
import os
import subprocess
import sys
import tarfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from millrace.data.tokenizer import train_bpe
from tests.house.typing_tree import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other as siblings

from peers import environments, measure, metrics, payloads, run, server, tables, write
from peers.arms import ours
from peers.decode import Collate
from peers.job import Job


class TestPayloads:
    def test_another_process_makes_the_same(self) -> None:
        script = (
            "from peers import payloads as p; import hashlib\n"
            "print(hashlib.sha256(b''.join(make(5) for make in (p.text, p.audio, p.image))).hexdigest())"
        )
        env = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
        said = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        here, other = (
            hashlib.sha256(b"".join(make(n) for make in (payloads.text, payloads.audio, payloads.image))).hexdigest()
            for n in (5, 6)
        )
        assert said.stdout.strip() == here != other

    def test_lengths_of_texts_are_log_normal(self) -> None:
        words = np.log([len(payloads.text(sample).split()) for sample in range(800)])
        assert abs(words.mean() - math.log(60)) < 0.1
        assert abs(words.std() - 1) < 0.1

    def test_media_decode_to_one_shape_and_have_entropy(self) -> None:
        images = [payloads.image(sample) for sample in range(4)]
        clips = [payloads.audio(sample) for sample in range(3)]
        assert all(12_000 < len(image) < 32_000 for image in images)
        assert all(40_000 < len(clip) < 110_000 for clip in clips)
        batch = Collate("images", "")([(i, 0, image) for i, image in enumerate(images)])
        assert batch["data"].shape == (4, 256, 256, 3) and str(batch["data"].dtype) == "torch.uint8"
        batch = Collate("audio", "")([(i, 0, clip) for i, clip in enumerate(clips)])
        assert batch["data"].shape == (3, 64_000) and str(batch["data"].dtype) == "torch.float32"

    def test_token_rows_hold_every_token_in_order(self) -> None:
        documents = [np.arange(n, dtype=np.uint16) + 1 for n in (700, 0, 900)]
        batch = Collate("tokens", "")([(i, 7, d.tobytes()) for i, d in enumerate(documents)])
        tokens, following, positions = batch["data"].reshape(3, 2048).tolist()
        assert batch["data"].shape == (3, 2, 1024) and tokens == [*range(1, 701), *range(1, 901), *[0] * 448]
        assert following == [*range(2, 701), -100, *range(2, 901), -100, *[-100] * 448]
        assert positions == [*range(700), *range(900), *[0] * 448]
        assert batch["ids"].tolist() == [0, 1, 2] and batch["labels"].tolist() == [7, 7, 7]

    def test_labels_are_sorted_and_equally_many(self) -> None:
        assert np.bincount(payloads.labels(2000)).tolist() == [200] * 10
        assert (np.diff(payloads.labels(2000)) >= 0).all()

    def test_formats_hold_the_raw_payload(self, tmp_path: Path) -> None:
        payloads.make_raw("text", 70, tmp_path, lambda texts: [])
        raw = payloads.Raw(tmp_path)
        assert [raw[i] for i in range(70)] == [payloads.text(i) for i in range(70)]
        for kind, writer in (("parquet", write.write_parquet), ("tar", write.write_tar)):
            (tmp_path / kind).mkdir()
            writer("text", raw, tmp_path / kind)
        rows = pq.read_table(tmp_path / "parquet").to_pylist()
        assert [(row["id"], row["label"], row["text"].encode()) for row in rows] == [
            (i, i * 10 // 70, raw[i]) for i in range(70)
        ]
        found: dict[str, bytes] = {}
        for path in sorted((tmp_path / "tar").iterdir()):
            with tarfile.open(path) as file:
                found |= {m.name: file.extractfile(m).read() for m in file}  # type: ignore[union-attr]
        assert found == {f"{i:08d}.txt": raw[i] for i in range(70)} | {
            f"{i:08d}.cls": str(i * 10 // 70).encode() for i in range(70)
        }


@pytest.mark.parametrize("modality", ["text", "tokens", "images", "audio"])
def test_our_arm_gives_every_sample_once_whatever_the_format(
    modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))
    tokenizer = train_bpe([payloads.text(i).decode() for i in range(20)], 400)
    tokenizer.save(tmp_path / "tokenizer")
    payloads.make_raw(modality, 60, tmp_path / modality, tokenizer.encode)
    for kind, writer in (("parquet", write.write_parquet), ("tar", write.write_tar)):
        (tmp_path / modality / kind).mkdir()
        writer(modality, payloads.Raw(tmp_path / modality), tmp_path / modality / kind)
        job = Job(
            arm=f"ours-{kind}", modality=modality, data=str(tmp_path), endpoint=None, cache=str(tmp_path / "cache"),
            tokenizer=str(tmp_path / "tokenizer" / "tokenizer.json"), samples=60, batch=8, workers=0, seed=1,
        )  # fmt: skip
        ours.make_manifest(job)
        batches = list(ours.open_stream(job, None))
        assert sorted(np.concatenate([batch["ids"] for batch in batches]).tolist()) == list(range(60))
        assert all((batch["labels"] == payloads.labels(60)[batch["ids"]]).all() for batch in batches)
        if modality in ("images", "audio"):
            collated = Collate(modality, "")([(i, 0, payloads.MAKERS[modality](i)) for i in batches[0]["ids"]])
            assert (batches[0]["data"] == collated["data"]).all()


LATENCY = 0.05


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("objects")
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "x.bin").write_bytes(bytes(range(100)))
    (folder / "a" / "b" / "y&z.bin").write_bytes(b"")
    (folder.parent / "outside").write_bytes(b"secret")
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(server.ObjectServer(folder, LATENCY).serve())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield listening.sockets[0].getsockname()[1]
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


class TestServer:
    @pytest.mark.parametrize(
        ("asked", "start", "stop"),
        [("bytes=0-0", 0, 1), ("bytes=10-19", 10, 20), ("bytes=90-", 90, 100), ("bytes=-7", 93, 100)]
        + [("bytes=95-500", 95, 100), ("bytes=-500", 0, 100)],
    )
    def test_ranges(self, port: int, asked: str, start: int, stop: int) -> None:
        code, headers, body = ask(port, "/bench/a/x.bin", Range=asked)
        assert (code, body) == (206, bytes(range(start, stop)))
        assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/100"

    def test_a_range_beyond_the_end_is_refused(self, port: int) -> None:
        code, headers, body = ask(port, "/bench/a/x.bin", Range="bytes=100-")
        assert (code, headers["Content-Range"], body) == (416, "bytes */100", b"")

    def test_whole_objects_and_heads(self, port: int) -> None:
        code, headers, body = ask(port, "/bench/a/x.bin")
        assert (code, body, headers["Accept-Ranges"]) == (200, bytes(range(100)), "bytes")
        code, head, body = ask(port, "/bench/a/x.bin", "HEAD")
        assert (code, head["Content-Length"], body, head["ETag"]) == (200, "100", b"", headers["ETag"])
        assert ask(port, "/bench/a/b/y%26z.bin")[2] == b""

    @pytest.mark.parametrize("path", ["/bench/none", "/other/a/x.bin", "/bench/../outside", "/bench/a"])
    def test_what_is_not_there_or_outside_is_not_found(self, port: int, path: str) -> None:
        assert ask(port, path)[0] == 404

    def test_it_cannot_be_written_to(self, port: int) -> None:
        assert ask(port, "/bench/new", "PUT")[0] == 405

    def test_listing(self, port: int) -> None:
        _, _, body = ask(port, "/bench?list-type=2&prefix=a/")
        root = ET.fromstring(body)
        assert [(c.findtext("Key"), c.findtext("Size")) for c in root.iter("Contents")] == [
            ("a/b/y&z.bin", "0"), ("a/x.bin", "100"),
        ]  # fmt: skip
        root = ET.fromstring(ask(port, "/bench/?list-type=2&prefix=a/&delimiter=/")[2])
        assert [c.findtext("Key") for c in root.iter("Contents")] == ["a/x.bin"]
        assert [p.findtext("Prefix") for p in root.iter("CommonPrefixes")] == ["a/b/"]

    def test_every_request_waits_and_none_waits_for_another(self, port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        began = time.perf_counter()
        for _ in range(3):  # over one connection
            connection.request("GET", "/bench/a/x.bin")
            connection.getresponse().read()
        assert time.perf_counter() - began >= 3 * LATENCY
        connection.close()
        began = time.perf_counter()
        threads = [threading.Thread(target=ask, args=(port, "/bench/a/x.bin")) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert LATENCY <= time.perf_counter() - began < 10 * LATENCY


def poisson_entropy(samples: int) -> float:
    """Expected `distance_entropy` of a long permutation, to first order.

    Distance d comes about 2(n - d)/n times, as a Poisson count C: H = ln n - ∫ E[C ln C; mean 2u] du over u in [0, 1].
    """
    means = 2 * (np.arange(2000) + 0.5) / 2000
    total = np.zeros_like(means)
    for count in range(2, 30):
        total += np.exp(-means + count * np.log(means) - math.lgamma(count + 1)) * count * math.log(count)
    return math.log(samples) - float(total.mean())


class TestMetrics:
    def test_entropy_of_a_sequence_is_zero(self) -> None:
        assert metrics.distance_entropy(np.arange(100)) == 0
        assert metrics.relative_entropy(np.arange(100)) == 0

    def test_entropy_of_two_equal_distances(self) -> None:
        assert metrics.distance_entropy(np.array([0, 1, 3, 4, 6])) == pytest.approx(math.log(2))

    def test_entropy_of_a_permutation(self) -> None:
        ids = np.random.default_rng(3).permutation(100_000)
        assert metrics.distance_entropy(ids) == pytest.approx(poisson_entropy(100_000), rel=1e-3)
        assert metrics.relative_entropy(ids, 2) == pytest.approx(1, abs=1e-3)

    def test_expected_shards_by_counting_all_draws(self) -> None:
        for drawn, size in ((3, 2), (2, 3), (5, 3)):
            draws = list(itertools.combinations(range(7), drawn))
            truth = np.mean([len({i // size for i in draw}) for draw in draws])
            assert metrics.expected_shards(drawn, 7, size) == pytest.approx(truth)

    def test_shards_per_batch(self) -> None:
        ids = np.arange(320)
        ordered = metrics.shards_per_batch(np.split(ids, 32), 320, 32)
        assert ordered == pytest.approx(1 / metrics.expected_shards(10, 320, 10))
        shuffled = np.random.default_rng(0).permutation(320)
        assert metrics.shards_per_batch(np.split(shuffled, 32), 320, 32) == pytest.approx(1, abs=0.1)

    def test_label_chi2_is_one_over_all_draws(self) -> None:
        labels = np.array([0, 0, 0, 1, 1, 2, 2])
        draws = [np.array(draw) for draw in itertools.combinations(range(7), 3)]
        assert metrics.label_chi2(draws, labels) == pytest.approx(1)

    def test_label_chi2_of_batches_of_one_class(self) -> None:
        labels = payloads.labels(1000)
        batches = np.split(np.arange(1000), 20)  # 50 of a class: χ² = 50 · 9
        assert metrics.label_chi2(batches, labels) == pytest.approx(450 / (9 * 950 / 999))

    def test_tally(self) -> None:
        parts = [np.array([0, 1, 1, 2]), np.array([2, 2, 5]), np.zeros(0, np.int64)]
        assert metrics.tally(parts, 6) == metrics.Tally(duplicates=3, losses=2)
        assert metrics.tally([np.random.default_rng(0).permutation(50)], 50) == metrics.Tally(duplicates=0, losses=0)
        assert metrics.tally([], 3) == metrics.Tally(duplicates=0, losses=3)


class _Stream:
    """Ten samples at a time, as an arm gives them."""

    def __init__(self, start: int = 0) -> None:
        self.at = start

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        while self.at < 100:
            self.at += 10
            yield {"ids": np.arange(self.at - 10, self.at)}

    def state(self) -> int:
        return self.at


class TestMeasure:
    def test_ids_and_states_of_what_was_consumed(self, tmp_path: Path) -> None:
        ids = tmp_path / "x.ids"
        task = run.Task(job={}, result="", limit=1000, ids=str(ids), marks=[10, 45], every=30)
        found = run.consume(task, _Stream(), tmp_path)
        assert found["consumed"] == 100
        assert np.concatenate(measure.read_ids(ids)).tolist() == list(range(100))
        saved = {path.stem: path.read_bytes() for path in tmp_path.glob("*.pkl")}
        assert sorted(saved) == ["10", "45", "last"]
        import pickle

        assert {name: pickle.loads(data) for name, data in saved.items()} == {
            "10": {"state": 10, "consumed": 10}, "45": {"state": 50, "consumed": 50},
            "last": {"state": 90, "consumed": 90},
        }  # fmt: skip

    def test_rates_are_taken_inside_the_window(self, tmp_path: Path) -> None:
        found = run.consume(run.Task(job={}, result="", limit=100), _Stream(), tmp_path)
        assert found["window_samples"] == 60  # from 10 to 70
        assert found["seconds"] > 0

    def test_cpu_of_the_living_and_of_the_dead(self) -> None:
        burn = "import time\nwhile time.process_time() < 0.2: pass\n"
        before = run.tree_cpu_seconds(os.getpid())
        subprocess.run([sys.executable, "-S", "-c", burn], check=True)
        middle = run.tree_cpu_seconds(os.getpid())
        assert 0.18 <= middle - before < 0.5
        command = [sys.executable, "-S", "-c", burn + "print(flush=True); input()"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            assert child.pid in run.descendants(os.getpid())
            assert 0.18 <= run.tree_cpu_seconds(os.getpid()) - middle < 0.5
            child.communicate(b"\n")

    def test_pss_agrees_with_psutil(self) -> None:
        assert measure.pss_bytes(os.getpid()) == pytest.approx(psutil.Process().memory_full_info().pss, rel=0.05)
        assert measure.pss_bytes(2**22 + 1) == 0

    def test_best_peer(self) -> None:
        rate = {"samples_per_cpu_s": (1.0, 2.0, 3.0)}
        found = tables.against_best_peer(
            {
                "speed/tokens/local/w0/ours-tar": {"samples_per_cpu_s": (5.0, 6.0, 7.0)},
                "speed/tokens/local/w2/litdata": {"samples_per_cpu_s": (4.0, 4.0, 4.0)},
                "speed/tokens/local/w0/litdata": rate,
                "speed/tokens/local/w0/ceiling": {"samples_per_cpu_s": (9.0, 9.0, 9.0)},
                "speed/images/local/w0/ours-mds": {"missing": "not yet"},
                "speed/images/local/w0/webdataset": rate,
            }
        )
        assert found["tokens"] == {"ours": ("ours-tar w0", 6.0), "peer": ("litdata w2", 4.0), "ratio": 1.5}
        assert found["images"] == {"peer": ("webdataset w0", 2.0)}

    def test_missing_and_failed_arms_have_no_figures(self) -> None:
        assert tables.summarise([{"missing": "why"}] * 2) == {"missing": "why"}
        found = tables.summarise([{"error": "x"}, {"samples_per_s": 3.0}])
        assert (found["rounds"], found["failed"], found["samples_per_s"]) == (1, 1, (3.0, 3.0, 3.0))

    def test_requirements_are_pinned(self) -> None:
        for environment in environments.ENVIRONMENTS.values():
            assert all("==" in wanted for wanted in environment.resolved + environment.bare)
            assert not any("torchvision" in wanted for wanted in environment.resolved + environment.bare)


def test_a_flac_clip_is_what_it_says() -> None:
    import soundfile

    with soundfile.SoundFile(io.BytesIO(payloads.audio(1))) as file:
        assert (file.format, file.samplerate, file.channels, file.frames) == ("FLAC", 16_000, 1, 64_000)
