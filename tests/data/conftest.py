"""Small corpora in every format, prepared once per session where they are only read."""

from __future__ import annotations

import io
import json
import random
import struct
import sys
import wave
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace.data.corpus import Corpus
from millrace.data.manifest import Manifest
from millrace.data.prepare import PrepareConfig, prepare
from millrace.data.reader import ShardReader
from millrace.data.sources.base import Content

SENTENCE = "the quick brown fox jumps over a lazy dog while naïve 鳥 sing and 3.14 is printed"


def make_documents(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Documents of 0 to `longest` words, the first of them empty."""
    draw = random.Random(seed)
    documents = [" ".join(draw.choices(SENTENCE.split(), k=draw.randrange(longest))) for _ in range(count)]
    return ["", *documents[1:]] if count > 1 else documents


def write_jsonl(path: Path, documents: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return path


def write_parquet(path: Path, documents: Sequence[str], row_group: int) -> Path:
    pq.write_table(pa.table({"text": list(documents)}), path, row_group_size=row_group)
    return path


def prepare_documents(folder: Path, documents: Sequence[str], name: str = "", **options: object) -> Path:
    """A manifest of `documents` as one JSONL file, with one source of that name; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_jsonl(folder / "documents.jsonl", documents)
    values = {"vocab_size": 300} | options
    prepare(PrepareConfig(inputs=[f"{name}={source}" if name else str(source)], out=str(folder / "corpus"), **values))  # type: ignore[arg-type]
    return folder / "corpus"


def read_samples(folder: Path) -> list[Content]:
    """Values of all samples of a manifest, in its order."""
    manifest = Manifest.load(folder)
    return ShardReader(Corpus([manifest])).read(np.arange(manifest.samples))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_png(width: int, height: int) -> bytes:
    """A black picture."""

    def part(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    pixels = zlib.compress((b"\0" + b"\0" * width) * height)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", pixels) + part(b"IEND", b"")


def make_wav(frames: int, rate: int) -> bytes:
    """Silence, in mono."""
    raw = io.BytesIO()
    with wave.open(raw, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"\0\0" * frames)
    return raw.getvalue()


@pytest.fixture(scope="session")
def corpora() -> SimpleNamespace:
    """The functions above: test modules cannot import each other."""
    return SimpleNamespace(
        make_documents=make_documents,
        write_jsonl=write_jsonl,
        write_parquet=write_parquet,
        prepare_documents=prepare_documents,
        read_samples=read_samples,
        files_of=files_of,
        make_png=make_png,
        make_wav=make_wav,
    )


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(90)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """90 documents in three Parquet shards with small row groups, tokenised on the fly."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        write_parquet(folder / f"{number}.parquet", documents[number * 30 : number * 30 + 30], 7)
    prepare(PrepareConfig(inputs=[str(folder / "*.parquet")], out=str(folder / "out"), vocab_size=300))
    return folder / "out"


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The node's cache of the user who runs the tests is not touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILLRACE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, no hub, no torchcodec."""
    import datasets
    import huggingface_hub.constants

    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "hf" / name)
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    for name in ("torchcodec", "torchcodec.decoders", "torchcodec.encoders"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        {
            "text": f"sample {i}\nof a set" if i % 3 else f'"naïve", 鳥 {i}',
            "image": make_png(3 + i % 5, 2),
            "audio": make_wav(50 + i, 8000),
            "tokens": list(range(i % 7)),
        }
        for i in range(30)
    ]
