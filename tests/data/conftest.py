"""Small corpora in every format, prepared once per session where they are only read."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace.data.prepare import PrepareConfig, prepare

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


def prepare_documents(folder: Path, documents: Sequence[str], **options: object) -> Path:
    """A manifest of `documents` as one JSONL file; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_jsonl(folder / "documents.jsonl", documents)
    values = {"vocab_size": 300} | options
    prepare(PrepareConfig(inputs=[str(source)], out=str(folder / "corpus"), **values))  # type: ignore[arg-type]
    return folder / "corpus"


@pytest.fixture(scope="session")
def corpora() -> SimpleNamespace:
    """The functions above: test modules cannot import each other."""
    return SimpleNamespace(
        make_documents=make_documents,
        write_jsonl=write_jsonl,
        write_parquet=write_parquet,
        prepare_documents=prepare_documents,
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
