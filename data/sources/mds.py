"""MDS, the shards of mosaicml-streaming: samples of columns with an encoding each; read by byte offset.

Layout (`streaming/base/format/mds/writer.py`, version 2), all integers little-endian uint32: the number of samples n;
n + 1 offsets, the last of which is the file's size; a JSON object with the columns; the samples. A sample has the
sizes of its columns of variable size, then the values. The columns stand in every shard, so `index.json` is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from millrace.core.errors import UserError
from millrace.data import MODALITIES
from millrace.data.sources.base import (
    MAX_SAMPLE_BYTES,
    BadSample,
    Content,
    Place,
    Sample,
    Source,
    Value,
    decode,
    text_bytes,
)
from millrace.data.sources.columnar import wanted_columns
from millrace.data.sources.compressed import Plain
from millrace.data.sources.ranges import read_ranges
from millrace.data.sources.recent import Recent
from millrace.data.stores.base import Blob

_MAX_CONFIG = 2**20
_STEP = 2**16  # offsets read at once
_BLOCK_BITS = 20  # samples whose offsets share a mebibyte form a block
_SUFFIXES: dict[str, Literal["gz", "zst"]] = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
_ENCODINGS = {"text": ("str",), "image": ("jpeg", "png", "bytes"), "tokens": ("ndarray",)}  # others: bytes
_TYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}  # integers of an ndarray
_NAMED = {np.dtype(code).name: code for code in _TYPES.values()}

Get = Callable[[memoryview], Value | BadSample]


@dataclass(frozen=True)
class _Layout:
    """Columns of a shard."""

    start: int  # of the first sample
    samples: int
    sizes: list[int | None]  # bytes of each column, None where they vary
    wanted: list[tuple[str, int, Get]]  # role, number of the column, how to make its value


class MdsSource(Source):
    """A place is (byte offset, length) of a sample, in the decompressed shard (.mds.gz, .mds.zst, .mds.zstd).

    Roles: `text` (encoding str), `image` (jpeg, png, bytes), `audio` (bytes), `tokens` (ndarray of integers, one
    dimension). A shard with a pickled column is refused.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        super().__init__(columns)
        self._plain = Plain()
        self._layouts: Recent[_Layout] = Recent(1024)

    def scan(self, blob: Blob) -> Iterator[Sample]:
        """Stream the samples."""
        blob = self._inflated(blob)
        layout = self._layout(blob)
        for places in _places(blob, layout):
            small = [place for place in places if place[1] <= MAX_SAMPLE_BYTES]
            contents = zip(small, read_ranges(blob, small), strict=True)
            for place in places:
                if place[1] > MAX_SAMPLE_BYTES:
                    why = f"the sample at byte {place[0]} has {place[1]} bytes, more than {MAX_SAMPLE_BYTES}"
                    yield Sample(place, BadSample(why), 0)
                else:
                    content = _record(next(contents)[1], layout, place)
                    yield Sample(place, content, text_bytes(content))

    def read(self, blob: Blob, places: Sequence[Place]) -> list[Content]:
        """Read each sample, those that lie close at once."""
        blob = self._inflated(blob)
        layout = self._layout(blob)
        ranges = zip(read_ranges(blob, places), places, strict=True)
        return [_record(raw, layout, place) for raw, place in ranges]

    def ranges(self, blob: Blob, places: np.ndarray) -> np.ndarray:
        """The header and the places; nothing of a compressed shard, which is decompressed as a whole."""
        return np.concatenate([[[0, 8]], places]) if self._compression(blob) is None else places[:0]

    def block(self, place: Place) -> int:
        """Samples that start in the same mebibyte."""
        return place[0] >> _BLOCK_BITS

    def _inflated(self, blob: Blob) -> Blob:
        compression = self._compression(blob)
        return self._plain.of(blob, compression) if compression else blob

    def _compression(self, blob: Blob) -> Literal["gz", "zst"] | None:
        name = blob.url.partition("?")[0].lower()
        return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(f".mds{suffix}")), None)

    def _layout(self, blob: Blob) -> _Layout:
        return self._layouts.get(blob.url, lambda: _read_layout(blob, self.columns))


def _places(blob: Blob, layout: _Layout) -> Iterator[list[Place]]:
    """Places of all samples, some at a time."""
    before = layout.start
    for first in range(0, layout.samples, _STEP):
        count = min(_STEP, layout.samples - first)
        ends = np.frombuffer(blob.read(8 + 4 * first, 4 * count), "<u4").astype(np.int64)
        starts = np.concatenate([[before], ends[:-1]])
        if (ends < starts).any() or ends[-1] > blob.size:
            raise UserError(f"{blob.url} is damaged: the offsets of its samples do not ascend to its size, {blob.size}")
        before = int(ends[-1])
        yield list(zip(starts.tolist(), (ends - starts).tolist(), strict=True))
    if before != blob.size:
        raise UserError(f"{blob.url} has {blob.size} bytes, its samples end at {before}: it is not the whole shard")


def _read_layout(blob: Blob, columns: Mapping[str, str]) -> _Layout:
    config, start, samples = _read_config(blob)
    try:
        names, encodings, sizes = (config[f"column_{kind}"] for kind in ("names", "encodings", "sizes"))
        whole = len(names) == len(encodings) == len(sizes) and config["format"] == "mds" and config["version"] == 2
        for name, encoding, size in zip(names, encodings, sizes, strict=True):
            whole = whole and isinstance(name, str) and isinstance(encoding, str)
            whole = whole and (size is None or (isinstance(size, int) and 0 < size < 2**32))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{blob.url} is not an MDS shard of version 2: its columns are not described as they should be")
    for name, encoding in zip(names, encodings, strict=True):
        if encoding.partition(":")[0] == "pkl":
            raise UserError(
                f"{blob.url}: the column '{name}' is pickled, which runs code when it is read; write it as json"
            )
    roles = {role: name for role, name in columns.items() if role != "bytes"}
    wanted_columns(list(roles.values()), names, blob.url)
    wanted = []
    for role, name in roles.items():
        number = names.index(name)
        wanted.append((role, number, _getter(role, encodings[number], f"{blob.url}: column '{name}'")))
    return _Layout(start, samples, sizes, wanted)


def _read_config(blob: Blob) -> tuple[Any, int, int]:
    """(the columns' description, offset of the first sample, number of samples)."""
    if blob.size < 8:
        raise UserError(f"{blob.url} is not an MDS shard: it has {blob.size} bytes")
    samples, start = np.frombuffer(blob.read(0, 8), "<u4").tolist()
    at = 4 + 4 * (samples + 1)
    if not at < start <= min(blob.size, at + _MAX_CONFIG):
        raise UserError(f"{blob.url} is not an MDS shard, or is cut short: its header does not fit {blob.size} bytes")
    try:
        return json.loads(blob.read(at, start - at)), start, samples
    except (ValueError, RecursionError):
        raise UserError(f"{blob.url} is not an MDS shard: its columns are not described in JSON") from None


def _record(raw: memoryview, layout: _Layout, place: Place) -> Content:
    """Values of a sample; `raw` is all of it."""
    sizes, at = [], 0
    for size in layout.sizes:
        if size is None:
            size, at = int.from_bytes(raw[at : at + 4], "little"), at + 4
        sizes.append(size)
    ends = [at]
    for size in sizes:
        ends.append(ends[-1] + size)
    if ends[-1] != len(raw):
        return BadSample(f"the sample at byte {place[0]} has {len(raw)} bytes, its columns {ends[-1]}")
    record: dict[str, Value] = {}
    for role, number, get in layout.wanted:
        value = get(raw[ends[number] : ends[number + 1]])
        if isinstance(value, BadSample):
            return BadSample(f"the sample at byte {place[0]}: {value.why}")
        record[role] = value
    return record


def _getter(role: str, encoding: str, where: str) -> Get:
    """How a value of `role` is made from a column of `encoding`."""
    kind, _, detail = encoding.partition(":")
    allowed = _ENCODINGS.get(role, ("bytes",) if role in MODALITIES else ())
    dtype, _, shape = detail.partition(":")
    if kind not in allowed or "," in shape or (role == "tokens" and dtype and dtype not in _NAMED):
        raise UserError(f"{where} is '{encoding}'; `{role}` is {' or '.join(allowed) or 'not a role of MDS'}")
    if role == "text":
        return decode
    return _array(_NAMED.get(dtype), not shape) if role == "tokens" else bytes


def _array(dtype: str | None, shaped: bool) -> Get:
    """One-dimensional arrays; the type, if not given, and the shape, if `shaped`, precede the values."""

    def get(raw: memoryview) -> np.ndarray | BadSample:
        code = dtype or (_TYPES.get(raw[0]) if len(raw) else None)
        at = 0 if dtype else 1
        if shaped and code:
            if len(raw) <= at or raw[at] >> 2 != 1:
                return BadSample("the tokens are not an array of one dimension")
            at += 1 + 2 ** (raw[at] & 3)
        if not code or (len(raw) - at) % np.dtype(code).itemsize:
            return BadSample("the tokens are not an array of integers")
        return np.frombuffer(bytes(raw[at:]), code)

    return get
