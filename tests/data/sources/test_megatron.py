from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data.sources.values import without_borders
from tests.data.sources.check import Remote, agree, cut_everywhere, make, scan

TOKENS = {"tokens": "tokens"}
CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}


def write(path: Path, documents: list[list[list[int]]], code: int = 8, modes: bool = False) -> Path:
    """Documents of sequences, as `IndexedDatasetBuilder` of megatron.core writes them (`_IndexWriter.write`)."""
    dtype = np.dtype(CODES[code])
    sequences = [np.array(ids, dtype) for document in documents for ids in document]
    borders = np.cumsum([0, *map(len, documents)]).astype("<i8")
    lengths = np.array([len(ids) for ids in sequences], "<i4")
    pointers = np.cumsum([0, *(ids.nbytes for ids in sequences)])[:-1].astype("<i8")
    path.write_bytes(b"".join(ids.tobytes() for ids in sequences))
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(borders))
    tail = bytes(len(sequences)) if modes else b""
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + borders.tobytes() + tail)
    return path


DOCUMENTS = [[[1, 2, 3]], [], [[4], [5, 6]], [[]], [[7, 100]]]
FLAT = [{"tokens": [1, 2, 3]}, {"tokens": []}, {"tokens": [4, 5, 6]}, {"tokens": []}, {"tokens": [7, 100]}]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_documents_of_every_integer_type(tmp_path: Path, code: int) -> None:
    path = write(tmp_path / "a_text_document.bin", DOCUMENTS, code)
    samples = scan("megatron", TOKENS, path)
    assert [s.content["tokens"].tolist() for s in samples] == [c["tokens"] for c in FLAT]
    size = np.dtype(CODES[code]).itemsize
    assert [s.place for s in samples] == [
        (0, 3 * size),
        (3 * size, 0),
        (3 * size, 3 * size),
        (6 * size, 0),
        (6 * size, 2 * size),
    ]
    assert {s.content["tokens"].dtype for s in samples} == {np.dtype(CODES[code])}


def test_any_documents_are_read_later(tmp_path: Path) -> None:
    full = [[[i] * (i % 7 + 1)] for i in range(60)]
    agree("megatron", TOKENS, write(tmp_path / "a.bin", full), [{"tokens": d[0]} for d in full])
    agree("megatron", TOKENS, write(tmp_path / "b.bin", full, modes=True), [{"tokens": d[0]} for d in full])


def test_documents_that_lie_close_are_read_in_one_request(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [[[i] * 100] for i in range(500)])
    places, blob = [sample.place for sample in scan("megatron", TOKENS, path)], Remote(path)
    make("megatron", TOKENS).read(blob, places[::2])
    assert blob.requests == 1 and blob.bytes == 499 * 200


def test_a_closing_end_of_document_stays_and_is_removed_by_who_knows_the_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [[[5, 6, 2]], [[5, 2, 2]], [[2]], []])
    ids = [sample.content["tokens"] for sample in scan("megatron", TOKENS, path)]
    assert [i.tolist() for i in ids] == [[5, 6, 2], [5, 2, 2], [2], []]
    assert [without_borders(i, 1, 2).tolist() for i in ids] == [[5, 6], [5, 2], [], []]
    assert without_borders(np.array([1, 5, 1]), 1, 2).tolist() == [5, 1]
    assert without_borders(np.array([2]), 2, 2).tolist() == []
    assert without_borders(np.array([2, 3, 2]), 2, 2).tolist() == [3]


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", DOCUMENTS, 7)
    with pytest.raises(UserError, match="a.idx has version 1 and type 7; version 1 and integers are read"):
        scan("megatron", TOKENS, path)
    path.with_suffix(".idx").write_bytes(b"TNTIDX\0\0" + bytes(40))
    with pytest.raises(UserError, match="a.idx is not an index of Megatron"):
        scan("megatron", TOKENS, path)
    path.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match="a.bin needs its index beside it: cannot read .*a.idx"):
        scan("megatron", TOKENS, path)
    with pytest.raises(UserError, match="a .bin file of Megatron cannot hold 'text'"):
        make("megatron", {"text": "text"})


def test_a_shard_or_an_index_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", DOCUMENTS)
    assert cut_everywhere("megatron", TOKENS, path, range(path.stat().st_size)) == []
    index, raw = path.with_suffix(".idx"), path.with_suffix(".idx").read_bytes()
    for cut in range(len(raw)):
        index.write_bytes(raw[:cut])
        with pytest.raises(UserError, match="a.idx"):
            scan("megatron", TOKENS, path)
    path.write_bytes(path.read_bytes() + b"\0\0")
    index.write_bytes(raw)
    with pytest.raises(UserError, match="the two do not belong together"):
        scan("megatron", TOKENS, path)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("sequences", 2**60, "does not fit"),
        ("borders", 2**61, "does not fit"),
        ("borders", 0, "does not fit"),
        ("length", -1, "do not lie one behind the other"),
        ("length", 2**31 - 1, "do not lie one behind the other"),
        ("pointer", 2**62, "do not lie one behind the other"),
        ("border", 3, "a.idx is damaged: its documents do not ascend|first document begins at sequence 3"),
        ("border", -1, "a.idx is damaged"),
        ("last", 2**40, "a.idx is damaged: its documents do not ascend"),
        ("last", 4, "the two do not belong together"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, field: str, value: int, reason: str) -> None:
    path = write(tmp_path / "a.bin", DOCUMENTS)
    index = path.with_suffix(".idx")
    raw, sequences = bytearray(index.read_bytes()), 5
    at = {"sequences": 18, "borders": 26, "length": 34, "pointer": 34 + 4 * sequences + 8}
    at |= {"border": 34 + 12 * sequences, "last": len(raw) - 8}
    struct.pack_into("<i" if field == "length" else "<Q" if value >= 0 else "<q", raw, at[field], value)
    index.write_bytes(raw)
    with pytest.raises(UserError, match=reason):
        scan("megatron", TOKENS, path)


@settings(max_examples=25)
@given(st.lists(st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=8), max_size=3), max_size=20))
def test_any_documents_come_back(documents: list[list[list[int]]]) -> None:
    flat = [{"tokens": [i for ids in document for i in ids]} for document in documents]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.bin", documents)
        samples = scan("megatron", TOKENS, path)
        assert [s.content["tokens"].tolist() for s in samples] == [c["tokens"] for c in flat]
        read = make("megatron", TOKENS).read(Remote(path), [s.place for s in samples])
        assert [c["tokens"].tolist() for c in read] == [c["tokens"] for c in flat]
