from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data.sources import ipc
from millrace.data.sources.base import BadSample
from millrace.data.sources.columnar import Rows
from tests.data.sources.check import Remote, agree, cut_everywhere, fails, make, scan

TEXT = {"text": "text"}
WRITERS = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}


def write(path: Path, table: pa.Table, form: str = "stream", rows: int = 4, compression: str | None = None) -> Path:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as file, WRITERS[form](file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def table(count: int = 11) -> pa.Table:
    return pa.table(
        {
            "text": [f"text {i} é" * (i % 3) for i in range(count)],
            "image": pa.array(
                [{"bytes": bytes([i]) * i, "path": None} for i in range(count)],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "ids": pa.array([list(range(i)) for i in range(count)], pa.list_(pa.int64())),
            "kind": pa.array(["aa", "b"] * count)[:count].dictionary_encode(),
        }
    )


def rows(count: int = 11) -> list[dict]:
    return [{"text": r["text"], "image": r["image"]["bytes"], "tokens": r["ids"]} for r in table(count).to_pylist()]


ROLES = {"text": "text", "image": "image", "tokens": "ids"}


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("form", WRITERS)
def test_streams_and_files(tmp_path: Path, form: str, compression: str | None) -> None:
    path = write(tmp_path / "a.arrow", table(), form, compression=compression)
    samples = agree("arrow", ROLES, path, rows())
    assert [s.place[1] for s in samples] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    agree("arrow", {"text": "kind"}, path, [{"text": text} for text in table()["kind"].to_pylist()])


def test_no_rows_are_no_samples(tmp_path: Path) -> None:
    for form in WRITERS:
        assert scan("arrow", TEXT, write(tmp_path / "a", table(0), form)) == []


def test_nulls_and_what_is_not_utf8_are_met_sample_by_sample(tmp_path: Path) -> None:
    raw = pa.array([b"good", None, b"\xff"], pa.binary())
    ids = pa.array([[1], None, [2, None]], pa.list_(pa.int32()))
    found = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, raw.buffers()), "ids": ids})
    path = write(tmp_path / "a.arrow", found)
    whys = [s.content.why for s in scan("arrow", TEXT, path) if isinstance(s.content, BadSample)]
    assert " is null" in whys[0] and "not UTF-8" in whys[1] and "row 2 of the batch at byte" in whys[1]
    contents = [s.content for s in scan("arrow", {"tokens": "ids"}, path)]
    assert contents[0]["tokens"].tolist() == [1]
    assert [c.why.split("byte ")[1].split(maxsplit=1)[1] for c in contents[1:]] == ["is null", "a token is null"]


def test_columns_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", table())
    with pytest.raises(UserError, match="a.arrow has no column 'texts'; did you mean 'text'"):
        scan("arrow", {"text": "texts"}, path)
    with pytest.raises(UserError, match="column 'ids' is list<.*>, not text"):
        scan("arrow", {"text": "ids"}, path)
    path.write_bytes(b"something else, longer than a header")
    with pytest.raises(UserError, match="a.arrow: there is no Arrow message at byte 0"):
        scan("arrow", TEXT, path)


@pytest.mark.parametrize("form", WRITERS)
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "a.arrow", table(5).select(["text", "kind"]), form)
    assert cut_everywhere("arrow", TEXT, path, range(path.stat().st_size)) == []


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_flipped_bit_is_never_a_crash(tmp_path: Path, compression: str | None) -> None:
    path = write(tmp_path / "a.arrow", table(6), compression=compression)
    good, raw = scan("arrow", ROLES, path), path.read_bytes()
    for bit in range(0, 8 * len(raw), 37):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        fails("arrow", ROLES, path, good)


def test_rows_of_a_damaged_batch_are_bad_and_others_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", table().select(["text"]), compression="zstd")
    good = scan("arrow", TEXT, path)
    raw = bytearray(path.read_bytes())
    second = good[4].place[0]
    raw[good[8].place[0] - 40 : good[8].place[0]] = bytes(40)
    path.write_bytes(raw)
    read = make("arrow", TEXT).read(Remote(path), [s.place for s in good])
    assert [isinstance(content, BadSample) for content in read] == [4 <= i < 8 for i in range(11)]
    assert f"the batch at byte {second} is damaged" in read[4].why


def test_a_bomb_is_refused_before_it_is_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.arrow", pa.table({"text": ["0" * 2**24] * 8}), rows=8, compression="zstd")
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(ipc, "MAX_BATCH", 2**26)
    with pytest.raises(UserError, match=rf"the batch at byte \d+ has {2**27 + 36} bytes, more than {2**26}"):
        scan("arrow", TEXT, path)


def test_long_values_of_a_dictionary_are_not_written_out(tmp_path: Path) -> None:
    coded = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int8()), ["x" * 2**20])
    path = write(tmp_path / "a.arrow", pa.table({"text": coded}), rows=100_000)  # 100 GB, written out
    with Remote(path) as blob:
        stream = make("arrow", TEXT).scan(blob)
        assert len(next(stream).content["text"]) == 2**20


def test_a_message_that_claims_more_than_there_is_is_refused(tmp_path: Path) -> None:
    head = write(tmp_path / "a.arrow", table(0)).read_bytes()[:-8]
    for size in (2**31 - 1, -1, 2**20):
        (tmp_path / "a.arrow").write_bytes(head + struct.pack("<Ii", 0xFFFFFFFF, size) + bytes(64))
        with pytest.raises(UserError, match="cut short|there is no Arrow message"):
            scan("arrow", TEXT, tmp_path / "a.arrow")


def test_dictionaries_that_change_on_the_way_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    schema = pa.schema([("text", pa.dictionary(pa.int8(), pa.string()))])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for texts in (["a", "b"], ["c", "d"]):
            writer.write_batch(pa.record_batch([pa.array(texts).dictionary_encode().cast(schema[0].type)], schema))
    with pytest.raises(UserError, match="has a dictionary or a schema among its batches, at byte"):
        scan("arrow", TEXT, path)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.text(max_size=20), st.binary(max_size=20), st.lists(st.integers(0, 99), max_size=5))),
    st.sampled_from(sorted(WRITERS)),
    st.integers(1, 5),
)
def test_any_rows_come_back(found: list[tuple[str, bytes, list[int]]], form: str, size: int) -> None:
    found = [(text.encode("utf-8", "replace").decode(), image, ids) for text, image, ids in found]
    kinds = [("t", pa.string()), ("i", pa.binary()), ("x", pa.list_(pa.uint16()))]
    columns = [pa.array([row[n] for row in found], kind) for n, (_, kind) in enumerate(kinds)]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a", pa.table(columns, names=[name for name, _ in kinds]), form, size)
        expected = [{"text": t, "image": i, "tokens": x} for t, i, x in found]
        agree("arrow", {"text": "t", "image": "i", "tokens": "x"}, path, expected)


def test_codes_beyond_a_dictionary_are_bad_samples() -> None:
    codes = pa.DictionaryArray.from_arrays(pa.array([0, 1, 7], pa.int8()), ["a", "b"], safe=False)
    rows = Rows(pa.table({"text": codes}), TEXT, "url")
    assert [rows.record(i, "row") for i in range(2)] == [{"text": "a"}, {"text": "b"}]
    assert rows.record(2, "row") == BadSample("row has code 7 of a dictionary of 2: it is damaged")
