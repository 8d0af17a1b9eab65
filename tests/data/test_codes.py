"""Codes of images and sounds: their bytes, and where they stand in batches."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from millrace.data.config import DataConfig
from millrace.data.loader import build_loader
from millrace.data.manifest import Header, Manifest, fingerprints
from millrace.data.modalities.base import modality
from millrace.data.modalities.codes import CodesCost, CodesView, pack, shape, unpack
from millrace.data.prepare import PrepareConfig, prepare

SIZES = arrays.array_shapes(min_dims=1, max_dims=3, max_side=6)


@given(SIZES.flatmap(lambda size: arrays.arrays(np.int64, size, elements=st.integers(0, 2**31 - 1))))
def test_what_is_packed_is_unpacked(codes: np.ndarray) -> None:
    raw = pack(codes)
    assert np.array_equal(unpack(raw), codes) and unpack(raw).dtype == np.int32 and shape(raw) == codes.shape
    assert np.array_equal(modality("audio_codes").decode(raw), codes.ravel()), "row by row"
    assert CodesCost().positions(raw) == codes.size + 2


def test_the_bytes_are_as_they_are_described() -> None:
    assert pack(np.array([[1, 2, 3], [4, 5, 255]])) == bytes([2, 1, 2, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3, 4, 5, 255])
    assert pack(np.array([256])) == bytes([1, 2, 1, 0, 0, 0, 0, 1])
    assert pack(np.array([65536])) == bytes([1, 4, 1, 0, 0, 0, 0, 0, 1, 0])


@pytest.mark.parametrize("codes", [np.zeros(0, int), np.zeros((1,) * 5, int), np.array([-1]), np.array([2**31]),
                                   np.array([0.5]), np.array(3)])  # fmt: skip
def test_what_are_no_codes_is_not_packed(codes: np.ndarray) -> None:
    with pytest.raises(ValueError, match="codes"):
        pack(codes)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "not codes"),
        (b"\x01", "not codes"),
        (b"\x89PNG\r\n\x1a\n", "not codes"),
        (bytes([1, 3, 1, 0, 0, 0, 1, 1, 1]), "not codes"),
        (bytes([2, 1, 1, 0, 0, 0]), "not codes"),
        (bytes([1, 1, 3, 0, 0, 0, 1, 2]), "2 bytes of codes, its header says 3"),
        (bytes([1, 1, 1, 0, 0, 0, 1, 2]), "2 bytes of codes, its header says 1"),
        (bytes([1, 1, 0, 0, 0, 0]), "0 bytes of codes, its header says 0"),
        (bytes([4, 4]) + b"\xff" * 16, "0 bytes of codes, its header says"),
        (bytes([1, 4, 1, 0, 0, 0, 0, 0, 0, 128]), "a code of 2147483648"),
    ],
)
def test_bytes_that_are_no_codes(raw: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        modality("image_codes").decode(raw)


@given(st.binary(max_size=64))
def test_any_bytes_are_codes_or_said_not_to_be(raw: bytes) -> None:
    try:
        assert modality("image_codes").decode(raw).size == CodesCost().positions(raw) - 2
    except ValueError as error:
        assert str(error)


def test_a_view_has_the_name_of_its_role() -> None:
    assert CodesView(role="audio_codes").name == "audio_codes"
    assert CodesView(role="audio_codes", name="said").name == "said"


def grid(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 300, (2, 2 + number % 3))


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coded")
    columns: dict[str, Any] = {"codes": [pack(grid(n)) for n in range(12)], "text": [f"plate {n}" for n in range(12)]}
    columns["codes"][5] = columns["codes"][5][:-2]
    pq.write_table(pa.table(columns), folder / "a.parquet")
    options = {"text": "text", "media": {"image_codes": "codes"}, "vocab_size": 280, "on_bad": "skip"}
    summary = prepare(PrepareConfig(inputs=[str(folder / "a.parquet")], out=str(folder / "out"), **options))
    assert len(summary.skipped) == 1 and "bytes of codes" in summary.skipped[0], "named, not lost"
    return folder / "out"


def test_manifests_without_codecs_have_the_fingerprints_that_they_had() -> None:
    header = {"version": 2, "columns": {"text": "text"}, "tokenizer": "a", "costs": {}}
    first = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    assert fingerprints({**header, "shards": []}) == [first]
    assert fingerprints({**header, "shards": [], "codecs": {"image_codes": "b"}}) != [first]
    made = Header(columns={"text": "text"}, tokenizer="a", costs={})
    assert made.record() == {name: header[name] for name in ("columns", "tokenizer", "costs")}


GOOD = [n for n in range(12) if n != 5]


def test_codes_stand_in_packed_rows(coded: Path) -> None:
    manifest = Manifest.load(coded)
    assert manifest.costs == {} and manifest.codecs == {} and manifest.samples == len(GOOD)
    with build_loader(DataConfig(manifest=str(coded), sequence_length=64), seed=0, batch_rows=2, micro_batch=2, rank=0,
                      world=1) as loader:  # fmt: skip
        (micro,) = next(loader).micro_batches
    placed = [sample for spans in micro.spans for sample, _, _ in spans]
    assert len(placed) == len(micro.media) > 4
    for sample, medium in zip(placed, micro.media, strict=True):
        assert medium.role == "image_codes" and medium.positions == grid(GOOD[sample]).size + 2
        assert medium.value.tolist() == grid(GOOD[sample]).ravel().tolist()


@pytest.mark.parametrize("views", [[], [{"role": "image_codes"}]])
def test_codes_of_samples_are_padded(coded: Path, views: list[dict[str, Any]]) -> None:
    config = DataConfig(manifest=str(coded), rows="samples", views=views)
    with build_loader(config, seed=0, batch_rows=6, micro_batch=6, rank=0, world=1) as loader:
        (micro,) = next(loader).micro_batches
    for row, sample in enumerate(micro.samples):
        expected, length = grid(GOOD[sample]).ravel(), int(micro.lengths["image_codes"][row])
        assert length == expected.size and micro.values["image_codes"][row, :length].tolist() == expected.tolist()
        assert not micro.values["image_codes"][row, length:].any()
    assert micro.present == {"image_codes": [True] * 6, "tokens": [True] * 6}
