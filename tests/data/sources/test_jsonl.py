from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data.sources.base import MAX_SAMPLE_BYTES, BadSample
from millrace.data.stores.base import StoreError, open_blob
from tests.data.sources.check import agree, cut_everywhere, make, scan

TEXT = {"text": "text"}
TEXTS = ["", "one\nline é", "鳥" * 50, "last"]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def packed(kind: str, raw: bytes) -> bytes:
    return gzip.compress(raw) if kind.endswith("gz") else zstandard.compress(raw)


COMPRESSED = ["jsonl.gz", "jsonl.zst"]


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_lines_are_read_by_their_offset_in_the_text(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(packed(kind, lines(TEXTS)))
    samples = agree(kind, TEXT, path, [{"text": text} for text in TEXTS])
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    assert samples == scan("jsonl", TEXT, tmp_path / "a.jsonl")


@pytest.mark.parametrize("kind", COMPRESSED)
def test_files_of_several_members_or_frames_are_read_to_their_end(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"".join(packed(kind, lines([text])) for text in TEXTS))
    agree(kind, TEXT, path, [{"text": text} for text in TEXTS])


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_compressed_file_cut_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(packed(kind, lines(TEXTS)))
    assert cut_everywhere(kind, TEXT, path, range(1, path.stat().st_size)) == []


@pytest.mark.parametrize("kind", COMPRESSED)
def test_what_is_not_compressed_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jsonl.x"
    path.write_bytes(lines(TEXTS))
    with pytest.raises(StoreError, match="a.jsonl.x cannot be decompressed"):
        scan(kind, TEXT, path)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(packed(kind, bytes(100 * 2**20)))
    assert path.stat().st_size < 200_000
    with pytest.raises(StoreError, match="bomb is larger than 64.0 MiB when decompressed: refused"):
        scan(kind, TEXT, path)
    with pytest.raises(StoreError, match="refused"):
        make(kind, TEXT).read(open_blob(path), [(0, 10)])


def test_tokens_are_integers_of_32_bits(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows: list = [[1, 2, 2**31 - 1], [], [-1]]
    bad: list = [[1.5], [True], "1 2", [[1]], [2**31], [2**70], None]
    path.write_text("".join(json.dumps({"ids": row, "n": 7, "text": "a"}) + "\n" for row in rows + bad))
    columns = {"tokens": "ids", "bytes": "n"}
    samples = scan("jsonl", columns, path)
    assert [s.content["tokens"].tolist() for s in samples[:3]] == rows
    assert {s.content["tokens"].dtype for s in samples[:3]} == {np.dtype(np.int32)}
    assert [s.bytes for s in samples[:3]] == [7, 7, 7]
    for sample in samples[3:]:
        assert "the tokens are not a list of integers of 32 bits" in sample.content.why
    path.write_text("".join(json.dumps({"ids": row, "text": "a"}) + "\n" for row in rows))
    agree("jsonl", {"tokens": "ids", "text": "text"}, path, [{"tokens": row, "text": "a"} for row in rows])


def test_a_role_that_lines_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match=r"a JSONL file cannot hold 'image' \('picture'\); it holds text, tokens"):
        make("jsonl", {"image": "picture"})


@settings(max_examples=25)
@given(st.lists(st.text(max_size=30), max_size=12), st.sampled_from(["jsonl", *COMPRESSED]))
def test_any_texts_come_back(texts: list[str], kind: str) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(lines(texts) if kind == "jsonl" else packed(kind, lines(texts)))
        agree(kind, TEXT, path, [{"text": text} for text in texts])


LIMITED = """
import resource, sys
from millrace.data.sources.jsonl import JsonlSource
from millrace.data.stores.base import open_blob
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
samples = list(JsonlSource({"text": "text"}).scan(open_blob(sys.argv[1])))
print(len(samples), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
for sample in samples: print(str(sample.content)[:200])
"""


def test_a_line_of_a_gigabyte_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "first"}\n{"text": "')
        file.seek(2**30, 1)
        file.write(b'"}\n{"text": "last"}\n')
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True)
    head, first, long, last = done.stdout.splitlines()
    count, mebibytes = map(int, head.split())
    assert count == 3 and mebibytes < 200
    assert "first" in first and "last" in last
    assert re.search(rf"the line at byte 18 has {2**30 + 13} bytes, more than {MAX_SAMPLE_BYTES}; split it", long)


def test_a_line_that_is_not_an_object_names_its_type(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("3\n" + "[" * 100_000 + "\n" + '{"text": ' + "9" * 5000 + "}\n")
    whys = [s.content.why for s in scan("jsonl", TEXT, path) if isinstance(s.content, BadSample)]
    assert "has no field 'text' (it has: int)" in whys[0]
    assert "is not JSON" in whys[1] and "is not JSON" in whys[2]
