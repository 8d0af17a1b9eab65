from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from millrace.data.sources.base import BadSample
from millrace.data.sources.ranges import read_ranges
from millrace.data.sources.recent import Recent
from millrace.data.sources.values import from_npy
from tests.data.sources.check import Remote


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


@given(arrays.arrays(arrays.integer_dtypes() | arrays.unsigned_integer_dtypes(endianness=">"), st.integers(0, 9)))
def test_numpy_files_of_integers(array: np.ndarray) -> None:
    for version in ((1, 0), (2, 0), (3, 0)):
        read = from_npy(npy(array, version))
        assert isinstance(read, np.ndarray) and read.dtype == array.dtype and read.tolist() == array.tolist()


@pytest.mark.parametrize(
    "array", [np.ones(3), np.ones((2, 2), int), np.int64(3), np.array(["a"]), np.array([(1,)], [("a", int)])]
)
def test_other_arrays_are_bad(array: np.ndarray) -> None:
    assert "not a one-dimensional array of integers" in from_npy(npy(np.asarray(array))).why  # type: ignore[union-attr]


def test_numpy_files_cut_anywhere_are_bad() -> None:
    raw = npy(np.arange(5))
    assert all(isinstance(from_npy(raw[:cut]), BadSample) for cut in range(len(raw)))
    assert isinstance(from_npy(raw + b"\0"), BadSample)


@given(st.lists(st.integers(0, 300_000), max_size=20), st.lists(st.integers(0, 2000), min_size=20, max_size=20))
def test_ranges_are_what_single_reads_give(starts: list[int], lengths: list[int]) -> None:
    blob = _Bytes(bytes(range(256)) * 1200)
    places = [(start, length) for start, length in zip(sorted(starts), lengths, strict=False)]
    assert [bytes(raw) for raw in read_ranges(blob, places)] == [blob.raw[a : a + n] for a, n in places]


class _Bytes:
    def __init__(self, raw: bytes) -> None:
        self.raw, self.requests = raw, 0

    def view(self, start: int, length: int) -> bytes:
        self.requests += 1
        return self.raw[start : start + length]


def test_ranges_far_apart_are_read_apart_and_runs_are_bounded(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        file.truncate(40 * 2**20)
    blob = Remote(tmp_path / "a")
    list(read_ranges(blob, [(0, 10), (100, 10), (2**20, 10)]))
    assert (blob.requests, blob.bytes) == (2, 120)
    blob = Remote(tmp_path / "a")
    list(read_ranges(blob, [(i * 2**19, 2**19) for i in range(80)]))
    assert blob.requests == 5


def test_the_newest_values_are_kept_up_to_the_limit() -> None:
    made: list[int] = []

    def make(n: int) -> int:
        made.append(n)
        return n

    kept: Recent[int] = Recent(10, lambda n: n)
    for n in (4, 5, 4, 3, 5, 4, 99, 1):
        kept.get(n, lambda n=n: make(n))
    assert made == [4, 5, 3, 5, 4, 99, 1]


def test_recent_values_are_safe_to_share() -> None:
    kept: Recent[int] = Recent(3)
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.extend(kept.get(n % 7, lambda n=n: n % 7) - n % 7 for n in range(2000)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [0] * 8000
