from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data.sources import parquet
from millrace.data.sources.base import MAX_SAMPLE_BYTES, BadSample
from millrace.data.sources.parquet_pages import Pages
from millrace.data.sources.thrift import DAMAGED, read_struct
from millrace.data.stores.local import LocalBlob
from tests.data.sources.check import Remote, agree, cut_everywhere, fails, make, scan

TEXT = {"text": "text"}


def write(path: Path, rows: list[dict], size: int = 4, **options: object) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=size, **options)
    return path


ROWS = [{"text": f"text {i} é" * i, "image": {"bytes": bytes([i]) * i, "path": "x"}, "ids": [i] * i} for i in range(11)]
ROLES = {"text": "text", "image": "image", "tokens": "ids"}


def test_images_of_datasets_and_tokens(tmp_path: Path) -> None:
    expected = [{"text": row["text"], "image": row["image"]["bytes"], "tokens": row["ids"]} for row in ROWS]
    agree("parquet", ROLES, write(tmp_path / "a.parquet", ROWS), expected)


def test_a_struct_that_is_null_is_a_null(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [{"image": {"bytes": b"x"}}, {"image": None}, {"image": {"bytes": None}}])
    good, *bad = [sample.content for sample in scan("parquet", {"image": "image"}, path)]
    assert good == {"image": b"x"}
    assert [content.why for content in bad] == ["row 1 of row group 0 is null", "row 2 of row group 0 is null"]


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ROWS[:5])
    assert cut_everywhere("parquet", TEXT, path, range(0, path.stat().st_size, 3)) == []


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_flipped_bit_is_never_a_crash(tmp_path: Path, compression: str) -> None:
    path = write(tmp_path / "a.parquet", ROWS[:6], compression=compression)
    good, raw = scan("parquet", ROLES, path), path.read_bytes()
    for bit in range(0, 8 * len(raw), 53):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        fails("parquet", ROLES, path, good)


def test_rows_of_a_damaged_group_are_bad_and_others_are_read(tmp_path: Path) -> None:
    rows = [{"text": os.urandom(500).hex()} for _ in range(12)]
    path = write(tmp_path / "a.parquet", rows, compression="zstd", use_dictionary=False)
    good, raw = scan("parquet", TEXT, path), bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    raw[start + 1000 : start + 1060] = bytes(60)
    path.write_bytes(raw)
    read = make("parquet", TEXT).read(Remote(path), [s.place for s in good])
    assert [isinstance(content, BadSample) for content in read] == [4 <= i < 8 for i in range(12)]
    assert "a.parquet: row group 1 is damaged" in read[5].why
    with pytest.raises(UserError, match="row group 1 is damaged"):
        scan("parquet", TEXT, path)


def test_values_and_columns_beyond_the_limits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", [{"text": "x" * (MAX_SAMPLE_BYTES + 1)}, {"text": "y"}], compression="zstd")
    assert path.stat().st_size < 100_000
    bad, good = [sample.content for sample in scan("parquet", TEXT, path)]
    assert f"row 0 of row group 0 has {MAX_SAMPLE_BYTES + 1} bytes, more than" in bad.why and good == {"text": "y"}
    monkeypatch.setattr(parquet, "_MAX_GROUP", MAX_SAMPLE_BYTES)
    with pytest.raises(UserError, match=r"row group 0 has \d+ bytes, more than 67108864; write smaller"):
        scan("parquet", TEXT, path)
    read = make("parquet", TEXT).read(Remote(path), [(0, 1)])
    assert "write smaller row groups" in read[0].why


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_pages_are_those_that_pyarrow_reads(tmp_path: Path, version: str, dictionary: bool) -> None:
    options = {"compression": "zstd", "data_page_version": version, "use_dictionary": dictionary, "data_page_size": 500}
    rows = [{"text": f"{'text ' * (i % 7)}{i}", "ids": [i] * (i % 5), "x": {"bytes": b"x" * i}} for i in range(300)]
    path = write(tmp_path / "a.parquet", rows, 100, **options)
    pages, metadata = Pages(LocalBlob(str(path))), pq.ParquetFile(path).metadata
    for group in range(3):
        columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
        for name in ("text", "ids", "x"):
            (column,) = [c for c in columns if c.path_in_schema.split(".")[0] == name]
            found = pages.measure(group, [name])
            assert found.values == column.num_values and bool(found.dictionary) == dictionary
            assert 0.7 * column.total_uncompressed_size < found.bytes < column.total_uncompressed_size  # less headers
        assert pages.measure(group, ["text", "x"]).bytes == sum(pages.measure(group, [n]).bytes for n in ("text", "x"))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_struct_or_damaged(raw: bytes) -> None:
    with contextlib.suppress(*DAMAGED):
        _, stop = read_struct(raw, 0)
        assert 0 < stop <= len(raw)


def test_a_row_that_is_not_there_is_bad(tmp_path: Path) -> None:
    (content,) = make("parquet", TEXT).read(Remote(write(tmp_path / "a", ROWS, 20)), [(0, 99)])
    assert content == BadSample("row 99 of row group 0 does not exist: there are 11")


@settings(max_examples=20)
@given(st.lists(st.tuples(st.text(max_size=20), st.binary(max_size=20)), min_size=1), st.integers(1, 5))
def test_any_rows_come_back(found: list[tuple[str, bytes]], size: int) -> None:
    found = [(text.encode("utf-8", "replace").decode(), image) for text, image in found]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a", [{"t": t, "i": i} for t, i in found], size)
        agree("parquet", {"text": "t", "image": "i"}, path, [{"text": t, "image": i} for t, i in found])
