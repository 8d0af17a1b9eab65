"""Documents that are tokens alone take a shorter way: what comes of it must be what the records give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.data.corpus import Corpus
from millrace.data.documents import Documents
from millrace.data.index import ascending
from millrace.data.parts import Part, build_part
from millrace.data.prepare import PrepareConfig, prepare
from millrace.data.tokenizer import Tokenizer, load_tokenizer

KINDS = ["parquet", "arrow"]
IDS = np.random.default_rng(0).integers(10, 200, 4000).tolist()
PLAIN = [IDS[start : start + 1 + start % 37] for start in range(0, 3700, 37)]


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return load_tokenizer(corpus / "tokenizer")


def write(path: Path, rows: list[Any]) -> None:
    table = pa.table({"ids": pa.array(rows, pa.list_(pa.uint16()))})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table, max_chunksize=7)


def open_documents(tmp_path: Path, corpus: Path, kind: str, shards: list[list[Any]]) -> Documents:
    for number, rows in enumerate(shards):
        write(tmp_path / f"{number}.{kind}", rows)
    inputs, out = [str(tmp_path / f"*.{kind}")], tmp_path / "out"
    prepare(
        PrepareConfig(inputs=inputs, out=str(out), tokens="ids", tokenizer=str(corpus / "tokenizer"), on_bad="skip")
    )
    return Documents(Corpus.load(str(out)), load_tokenizer(corpus / "tokenizer"))


def same(part: Part, other: Part) -> bool:
    arrays = zip((part.tokens, part.offsets), (other.tokens, other.offsets), strict=True)
    return part.bad == other.bad and all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in arrays)


def by_records(documents: Documents, samples: np.ndarray) -> Part:
    return build_part(documents.reader.read(samples), documents._tokenizer, None)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_documents_take_the_short_way(tmp_path: Path, corpus: Path, kind: str) -> None:
    documents = open_documents(tmp_path, corpus, kind, [PLAIN[:40], [[]], PLAIN[40:]])
    draw = np.random.default_rng(1)
    for count in (1, 2, 17, 90):
        samples = np.sort(draw.choice(documents._corpus.samples, count, replace=False))
        found = documents.reader.tokens(samples)
        assert found is not None
        records = documents.reader.read(samples)
        assert [ids.tolist() for ids in found] == [record["tokens"].tolist() for record in records]  # type: ignore
        assert same(documents._read(samples), by_records(documents, samples))
    documents.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("odd", ["null", "hole", "bos", "eos", "unknown"])
def test_odd_documents_are_read_as_records(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, kind: str, odd: str
) -> None:
    row = {
        "null": None, "hole": [5, None, 6], "bos": [tokenizer.bos_id, 20, 21], "eos": [20, 21, tokenizer.eos_id],
        "unknown": [20, tokenizer.vocab_size],
    }[odd]  # fmt: skip
    documents = open_documents(tmp_path, corpus, kind, [PLAIN[:10], [*PLAIN[:3], row, *PLAIN[3:6]]])
    samples = np.arange(documents._corpus.samples)
    part = documents._read(samples)
    assert same(part, by_records(documents, samples)) and not part.bad
    assert len(samples) == 16 + (odd in ("bos", "eos"))  # the others are left out when they are indexed
    assert (documents.reader.tokens(samples) is None) == (odd in ("null", "hole"))
    if odd in ("bos", "eos"):
        assert part.tokens[part.offsets[13] : part.offsets[14]].tolist() == [tokenizer.bos_id, 20, 21, tokenizer.eos_id]
    documents.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_altered_document_is_found(tmp_path: Path, corpus: Path, kind: str) -> None:
    documents = open_documents(tmp_path, corpus, kind, [PLAIN[:10], PLAIN[10:20]])
    before = (tmp_path / f"1.{kind}").stat().st_size
    altered = [list(row) for row in PLAIN[10:20]]
    altered[4][0] = altered[4][0] ^ 1
    write(tmp_path / f"1.{kind}", altered)
    assert (tmp_path / f"1.{kind}").stat().st_size == before
    samples = np.arange(20)
    assert documents.reader.tokens(samples) is None
    part = documents._read(samples)
    assert list(part.bad) == [14] and "checksum" in part.bad[14]
    assert documents.reader.tokens(samples[:10]) is not None
    documents.close()


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(-(2**62), 2**62)))
def test_ascending(values: list[int]) -> None:
    assert np.array_equal(ascending(np.array(values, np.int64)), np.unique(np.array(values, np.int64)))
