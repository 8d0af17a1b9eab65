"""Prose of made-up words that every rule of quality lets pass, and a call of `curate` on texts."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from millrace.data.curate.config import CurateConfig
from millrace.data.curate.curate import Result, curate

_DRAW = random.Random(0)
VOCABULARY = ["".join(_DRAW.choices("abcdefghijklmnoprstuvwyz", k=_DRAW.randrange(3, 9))) for _ in range(3000)]


def prose(seed: int, words: int = 120) -> str:
    """Sentences of random words, a line each."""
    draw = random.Random(seed)
    chosen = draw.choices(VOCABULARY, k=words)
    return "\n".join(" ".join(chosen[at : at + 12]).capitalize() + "." for at in range(0, words, 12))


def write(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(folder: Path, texts: Sequence[str], **options: object) -> Result:
    """Curate `texts`, one JSONL file, in this process."""
    return curate(config(folder, [write(folder / "in.jsonl", texts)], **options))


def config(folder: Path, inputs: Sequence[Path], **options: object) -> CurateConfig:
    values = {"inputs": list(map(str, inputs)), "out": str(folder / "out"), "workers": 1} | options
    return CurateConfig(**values)  # type: ignore[arg-type]


def rows(out: Path, part: str = "text") -> list[dict]:
    """All rows of `text`, `removed` or `flagged`, in order."""
    return [row for path in sorted((out / part).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="session")
def made() -> SimpleNamespace:
    """The functions above: test modules cannot import each other."""
    return SimpleNamespace(prose=prose, write=write, run=run, config=config, rows=rows, vocabulary=VOCABULARY)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here may look for a server."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
