from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace.core.errors import UserError
from millrace.core.registry import lookup
from millrace.data import SOURCES
from millrace.data.sources.base import BadSample, Sample, Source
from millrace.data.sources.jsonl import JsonlSource
from millrace.data.sources.parquet import ParquetSource
from millrace.data.sources.text import TextSource
from millrace.data.stores.base import open_blob

TEXT = {"text": "text"}


def scan(source: Source, path: Path) -> list[Sample]:
    return list(source.scan(open_blob(path)))


def reread(source: Source, path: Path) -> list[object]:
    """Contents by random access, after checking that a scan saw the same."""
    scanned = scan(source, path)
    contents = source.read(open_blob(path), [sample.place for sample in scanned])
    assert contents == [sample.content for sample in scanned]
    return [content if isinstance(content, BadSample) else content["text"] for content in contents]


def test_jsonl_reads_lines_by_offset_and_skips_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "é\\n"}\r\n\n  \n{"id": 3, "text": ""}\n{"text": "last"}'.encode())
    source = JsonlSource(TEXT)
    assert reread(source, path) == ["é\n", "", "last"]
    assert [sample.bytes for sample in scan(source, path)] == [3, 0, 4]
    places = [sample.place for sample in scan(source, path)]
    assert source.read(open_blob(path), places[1:2]) == [{"text": ""}]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "\xff"}', "not UTF-8 at byte 26 .*0xff"),
        (b'{"text": ', "the line at byte 16 is not JSON"),
        (b'{"body": "a", "id": 1}', r"has no field 'text' \(it has: body, id\)"),
        (b'["a"]', "has no field 'text'"),
        (b'{"text": 3}', "the text is int, not a string"),
        (b'{"text": null}', "the text is NoneType"),
        (b'{"text": "\\ud800"}', "a lone surrogate at character 0"),
    ],
)
def test_jsonl_says_what_is_wrong_with_a_line(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text":"good"}\n' + line + b"\n")
    good, bad = scan(JsonlSource(TEXT), path)
    assert good.content == {"text": "good"}
    assert isinstance(bad.content, BadSample)
    assert re.search(why, bad.content.why), bad.content.why


def test_jsonl_blocks_are_mebibytes() -> None:
    assert [JsonlSource(TEXT).block((at, 9)) for at in (0, 2**20 - 1, 2**20, 5 * 2**20)] == [0, 0, 1, 5]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_reads_any_row_of_any_group(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"text {i} é" for i in range(23)]
    table = pa.table({"id": list(range(23)), "text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    source = ParquetSource(TEXT)
    assert reread(source, tmp_path / "a.parquet") == texts
    places = [sample.place for sample in scan(source, tmp_path / "a.parquet")]
    assert [places[i] for i in (0, 4, 5, 22)] == [(0, 0), (0, 4), (1, 0), (4, 2)]
    assert source.read(open_blob(tmp_path / "a.parquet"), [places[7], places[21]]) == [
        {"text": texts[i]} for i in (7, 21)
    ]


def test_parquet_meets_null_and_what_is_not_utf8_sample_by_sample(tmp_path: Path) -> None:
    raw = pa.array([b"good", None, b"\xff", b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    contents = reread(ParquetSource(TEXT), tmp_path / "a.parquet")
    assert contents[0] == "good" and contents[3] == "fine"
    assert contents[1] == BadSample("row 1 of row group 0 is null")
    assert isinstance(contents[2], BadSample) and "row 2 of row group 0: not UTF-8" in contents[2].why


def test_parquet_reads_tokens(tmp_path: Path) -> None:
    tokens = [[1, 2, 65535], [], [7]]
    table = pa.table({"tokens": pa.array(tokens, pa.list_(pa.uint16())), "bytes": [9, 0, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = ParquetSource({"tokens": "tokens", "bytes": "bytes"})
    samples = scan(source, tmp_path / "a.parquet")
    assert [sample.bytes for sample in samples] == [9, 0, 2]
    for content in (
        [s.content for s in samples],
        source.read(open_blob(tmp_path / "a.parquet"), [(0, 0), (0, 1), (0, 2)]),
    ):
        assert [c["tokens"].tolist() for c in content] == tokens


def test_parquet_errors_name_the_file_and_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"texts": ["a"], "n": [1]}), path)
    with pytest.raises(UserError, match="a.parquet has no column 'text'; did you mean 'texts'"):
        scan(ParquetSource(TEXT), path)
    with pytest.raises(UserError, match="column 'n' is int64, not text"):
        scan(ParquetSource({"text": "n"}), path)
    path.write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match="a.parquet is not a readable Parquet file"):
        scan(ParquetSource(TEXT), path)


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo é\n".encode())
    assert reread(TextSource(TEXT), path) == ["one\r\ntwo é\n"]
    path.write_bytes(b"abc\xe9 d")
    (sample,) = scan(TextSource(TEXT), path)
    assert sample.content == BadSample("not UTF-8 at byte 3 (invalid continuation byte: 0xe9)")


def test_every_registered_source_resolves() -> None:
    for kind in SOURCES:
        assert issubclass(lookup(SOURCES, kind, "source"), Source)
    with pytest.raises(UserError, match="unknown source 'parket'; did you mean 'parquet'"):
        lookup(SOURCES, "parket", "source")
