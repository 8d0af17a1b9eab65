from __future__ import annotations

import gzip
import hashlib
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data.sources.base import BadSample
from tests.data.sources.check import agree, cut_everywhere, fails, scan

SIZES = {"int": 8, "uint8": 1, "float32": 4}
SCALARS = {"int": np.int64, "uint8": np.uint8, "float32": np.float32}
CODES = {"uint8": 8, "int8": 9, "uint16": 16, "int16": 17, "uint32": 32, "int32": 33, "float32": 34, "int64": 65}


def encode(encoding: str, value: Any) -> bytes:
    """As `streaming/base/format/mds/encodings.py` of mosaicml-streaming 0.13."""
    kind, _, detail = encoding.partition(":")
    if kind == "str":
        return value.encode()
    if kind == "json":
        return json.dumps(value).encode()
    if kind in SCALARS:
        return SCALARS[kind](value).tobytes()
    if kind != "ndarray":
        return value
    dtype, _, shape = detail.partition(":")
    head = b"" if dtype else bytes([CODES[value.dtype.name]])
    if not shape:
        width = next(w for w in range(4) if max(value.shape) < 1 << 8 * 2**w)
        head += bytes([value.ndim << 2 | width]) + np.array(value.shape, f"<u{2**width}").tobytes()
    return head + value.tobytes()


def fixed_size(encoding: str) -> int | None:
    kind, _, detail = encoding.partition(":")
    dtype, _, shape = detail.partition(":")
    return int(shape) * np.dtype(dtype).itemsize if shape else SIZES.get(kind)


def write(path: Path, columns: dict[str, str], samples: list[dict[str, Any]]) -> Path:
    """As `MDSWriter` of mosaicml-streaming 0.13."""
    names = sorted(columns)
    sizes = [fixed_size(columns[name]) for name in names]
    config = json.dumps(
        {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": [],
            "size_limit": 2**26,
            "column_names": names,
            "column_encodings": [columns[name] for name in names],
            "column_sizes": sizes,
        },
        sort_keys=True,
    ).encode()
    parts = []
    for sample in samples:
        values = [encode(columns[name], sample[name]) for name in names]
        heads = [len(v) for v, size in zip(values, sizes, strict=True) if size is None]
        parts.append(np.array(heads, "<u4").tobytes() + b"".join(values))
    start = 4 + 4 * (len(parts) + 1) + len(config)
    offsets = start + np.cumsum([0, *map(len, parts)])
    path.write_bytes(struct.pack("<I", len(parts)) + offsets.astype("<u4").tobytes() + config + b"".join(parts))
    return path


COLUMNS = {
    "text": "str",
    "image": "bytes",
    "id": "int",
    "u": "uint8",
    "f": "float32",
    "dyn": "ndarray",
    "typed": "ndarray:uint16",
    "fixed": "ndarray:int64:4",
    "meta": "json",
}
SAMPLES = [
    {
        "text": f"text {i} é" * i,
        "image": bytes(range(i + 1)),
        "id": i * 1000 - 1,
        "u": 200 + i,
        "f": i / 3,
        "dyn": np.arange(1 + i * 300, dtype=np.int32),
        "typed": np.arange(i + 1, dtype=np.uint16),
        "fixed": np.arange(4, dtype=np.int64) + i,
        "meta": {"n": i},
    }
    for i in range(5)
]
GOLDEN = "eac292159c3a6e8a91f19eb867e342369cf1a40f242fecfeec440a5798a95f93"  # what MDSWriter 0.13 makes of SAMPLES
ROLES = {"text": "text", "image": "image"}


def test_the_writer_of_these_tests_writes_what_mosaicml_streaming_writes(tmp_path: Path) -> None:
    assert hashlib.sha256(write(tmp_path / "a.mds", COLUMNS, SAMPLES).read_bytes()).hexdigest() == GOLDEN


@pytest.mark.parametrize("tokens", ["dyn", "typed", "fixed"])
def test_shards_of_every_encoding(tmp_path: Path, tokens: str) -> None:
    path = write(tmp_path / "a.mds", COLUMNS, SAMPLES)
    expected = [{"text": s["text"], "image": s["image"], "tokens": s[tokens].tolist()} for s in SAMPLES]
    agree("mds", ROLES | {"tokens": tokens}, path, expected)


@pytest.mark.parametrize("suffix", ["gz", "zst", "zstd"])
def test_compressed_shards(tmp_path: Path, suffix: str) -> None:
    raw = write(tmp_path / "a.mds", COLUMNS, SAMPLES).read_bytes()
    path = tmp_path / f"a.mds.{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix == "gz" else zstandard.compress(raw))
    samples = agree("mds", ROLES, path, [{"text": s["text"], "image": s["image"]} for s in SAMPLES])
    assert samples == scan("mds", ROLES, tmp_path / "a.mds")


def test_columns_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mds", COLUMNS, SAMPLES)
    for columns, reason in (
        ({"text": "texts"}, "has no column 'texts'; did you mean 'text'"),
        ({"text": "id"}, "column 'id' is 'int'; `text` is str"),
        ({"image": "dyn"}, "column 'dyn' is 'ndarray'; `image` is jpeg or png or bytes"),
        ({"tokens": "image"}, "column 'image' is 'bytes'; `tokens` is ndarray"),
    ):
        with pytest.raises(UserError, match=f"a.mds.* {reason}"):
            scan("mds", columns, path)
    write(path, {"text": "str", "x": "ndarray:float32"}, [])
    with pytest.raises(UserError, match="column 'x' is 'ndarray:float32'; `tokens` is ndarray"):
        scan("mds", {"tokens": "x"}, path)
    assert scan("mds", {"text": "text"}, path) == []


def test_a_pickled_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mds", {"text": "str", "x": "pkl"}, [{"text": "a", "x": b"\x80\x05."}])
    with pytest.raises(UserError, match="a.mds: the column 'x' is pickled, which runs code when it is read"):
        scan("mds", {"text": "text"}, path)


def test_arrays_of_other_shapes_and_types_are_bad_samples(tmp_path: Path) -> None:
    arrays = [np.ones(3, np.int8), np.ones((2, 2), np.int8), np.ones(3, np.float32)]
    found = scan(
        "mds", {"tokens": "x"}, write(tmp_path / "a.mds", {"x": "ndarray"}, [{"x": array} for array in arrays])
    )
    assert found[0].content["tokens"].tolist() == [1, 1, 1]
    assert "not an array of one dimension" in found[1].content.why
    assert "not an array of integers" in found[2].content.why


def test_a_shard_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mds", {"text": "str", "n": "int"}, [{"text": f"é{i}", "n": i} for i in range(4)])
    assert cut_everywhere("mds", {"text": "text"}, path, range(path.stat().st_size)) == []


def test_a_flipped_bit_is_never_a_crash(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mds", COLUMNS, SAMPLES[:2])
    columns = ROLES | {"tokens": "dyn"}
    good, raw = scan("mds", columns, path), path.read_bytes()
    for bit in range(0, 8 * len(raw), 7):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        fails("mds", columns, path, good)


@pytest.mark.parametrize("count", [0, 2**31, 2**32 - 1])
def test_a_header_that_lies_is_refused_without_reading_what_it_claims(tmp_path: Path, count: int) -> None:
    (tmp_path / "a.mds").write_bytes(struct.pack("<II", count, 2**32 - 1) + bytes(100))
    with pytest.raises(UserError, match="a.mds is not an MDS shard, or is cut short"):
        scan("mds", ROLES, tmp_path / "a.mds")


def test_sizes_of_columns_that_do_not_add_up_make_a_bad_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mds", {"text": "str"}, [{"text": "abc"}, {"text": "def"}])
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"\x03\0\0\0abc", b"\xff\xff\xff\xffabc"))
    bad, good = (sample.content for sample in scan("mds", {"text": "text"}, path))
    assert isinstance(bad, BadSample) and "has 7 bytes, its columns" in bad.why and good == {"text": "def"}


@settings(max_examples=25)
@given(st.lists(st.tuples(st.text(max_size=20), st.binary(max_size=50), st.lists(st.integers(0, 255), min_size=1))))
def test_any_samples_come_back(rows: list[tuple[str, bytes, list[int]]]) -> None:
    rows = [(text.encode("utf-8", "replace").decode(), image, ids) for text, image, ids in rows]
    samples = [{"t": t, "i": i, "x": np.array(x, np.uint8)} for t, i, x in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.mds", {"t": "str", "i": "png", "x": "ndarray"}, samples)
        columns = {"text": "t", "image": "i", "tokens": "x"}
        agree("mds", columns, path, [{"text": t, "image": i, "tokens": x} for t, i, x in rows])
