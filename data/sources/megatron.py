"""Megatron's indexed data sets: token ids in `.bin`, where documents begin in the `.idx` beside it.

The index (`megatron/core/datasets/indexed_dataset.py`, version 1), little-endian: "MMIDIDX", two zero bytes, the
version (uint64), a code for the type of a token (uint8), the numbers of sequences s and of document borders d (uint64
each); s lengths in tokens (int32), s byte offsets (int64), d numbers of sequences at which documents begin, s at last
(int64).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from millrace.core.errors import UserError
from millrace.data.sources.base import MAX_SAMPLE_BYTES, BadSample, Content, Place, Sample, Source
from millrace.data.sources.beside import replace_suffix
from millrace.data.sources.ranges import read_ranges
from millrace.data.sources.recent import Recent
from millrace.data.sources.values import check_roles
from millrace.data.stores.base import Blob, StoreError, open_blob

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
_STEP = 2**16  # documents looked up at once
_BLOCK_BITS = 18  # documents whose offsets share a quarter of a mebibyte form a block: some 100,000 tokens


@dataclass(frozen=True)
class _Header:
    dtype: np.dtype
    sequences: int
    borders: int

    @property
    def offsets(self) -> int:
        """Where the byte offsets begin, behind the lengths."""
        return _HEADER.size + 4 * self.sequences

    @property
    def documents(self) -> int:
        """Where the documents' borders begin."""
        return self.offsets + 8 * self.sequences


class MegatronSource(Source):
    """A place is (byte offset, length) of a document in the .bin file. The role is `tokens`; its column has no meaning.

    Tokens are given as they lie. `preprocess_data.py --append-eod` ends every document that has tokens with the
    tokenizer's end-of-document id; without it there is none, and the files do not say which. A loader that adds borders
    of its own removes it first, for it knows the tokenizer: `values.without_borders`.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        super().__init__(columns)
        check_roles(columns, ("tokens", "bytes"), "a .bin file of Megatron")
        self._headers: Recent[_Header] = Recent(1024)

    def scan(self, blob: Blob) -> Iterator[Sample]:
        """Stream the documents in order."""
        try:
            index = _open_index(blob)
        except StoreError as error:
            raise UserError(f"{blob.url} needs its index beside it: {error}") from None
        with index:
            header = _read_header(index)
            for places in _places(blob, index, header):
                small = [place for place in places if place[1] <= MAX_SAMPLE_BYTES]
                found = read_ranges(blob, small)
                for place in places:
                    if place[1] <= MAX_SAMPLE_BYTES:
                        yield Sample(place, _tokens(next(found), header.dtype), 0)
                    else:
                        why = f"the document at byte {place[0]} has {place[1]} bytes, more than {MAX_SAMPLE_BYTES}"
                        yield Sample(place, BadSample(why), 0)

    def read(self, blob: Blob, places: Sequence[Place]) -> list[Content]:
        """Read each document, those that lie close at once."""
        dtype = self._headers.get(blob.url, lambda: _header_beside(blob)).dtype
        return [_tokens(raw, dtype) for raw in read_ranges(blob, places)]

    def ranges(self, blob: Blob, places: np.ndarray) -> np.ndarray:
        """The places."""
        return places

    def block(self, place: Place) -> int:
        """Documents that start in the same quarter of a mebibyte."""
        return place[0] >> _BLOCK_BITS


def _tokens(raw: memoryview, dtype: np.dtype) -> Content:
    if len(raw) % dtype.itemsize:
        return BadSample(f"{len(raw)} bytes are not a number of tokens of type {dtype}")
    return {"tokens": np.frombuffer(bytes(raw), dtype)}


def _open_index(blob: Blob) -> Blob:
    return open_blob(replace_suffix(blob.url, ".idx"))


def _header_beside(blob: Blob) -> _Header:
    with _open_index(blob) as index:
        return _read_header(index)


def _read_header(index: Blob) -> _Header:
    raw = index.read(0, min(index.size, _HEADER.size))
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise UserError(f"{index.url} is not an index of Megatron: it does not begin with {_MAGIC!r}")
    _, version, code, sequences, borders = _HEADER.unpack(raw)
    if version != 1 or code not in _TYPES:
        raise UserError(f"{index.url} has version {version} and type {code}; version 1 and integers are read")
    header = _Header(np.dtype(_TYPES[code]), sequences, borders)
    if borders < 1 or index.size not in (header.documents + 8 * borders, header.documents + 8 * borders + sequences):
        raise UserError(
            f"{index.url} has {index.size} bytes, which does not fit {sequences} sequences and {borders} borders: "
            "it is cut short or damaged"
        )
    return header


def _places(blob: Blob, index: Blob, header: _Header) -> Iterator[list[Place]]:
    """Places of all documents, some at a time; checks that the index and the shard fit each other."""
    sequence = at = 0  # where the next document must begin
    for first in range(0, header.borders, _STEP):
        raw = index.read(header.documents + 8 * first, 8 * min(_STEP, header.borders - first))
        borders = np.frombuffer(raw, "<i8")
        if borders[0] < sequence or (np.diff(borders) < 0).any() or borders[-1] > header.sequences:
            raise UserError(f"{index.url} is damaged: its documents do not ascend to {header.sequences} sequences")
        if first == 0 and borders[0] != 0:
            raise UserError(f"{index.url} is damaged: its first document begins at sequence {borders[0]}")
        stops = _offsets(index, header, sequence, int(borders[-1]), at)[borders - sequence]
        starts = np.concatenate([[at], stops[:-1]])[1 if first == 0 else 0 :]
        stops = stops[1 if first == 0 else 0 :]
        if len(stops):
            if stops[-1] > blob.size:
                raise UserError(f"{blob.url} has {blob.size} bytes, its index {stops[-1]}: it is cut short")
            yield list(zip(starts.tolist(), (stops - starts).tolist(), strict=True))
            at = int(stops[-1])
        sequence = int(borders[-1])
    if sequence != header.sequences or at != blob.size:
        raise UserError(
            f"{blob.url} has {blob.size} bytes, the documents of its index end at {at} with sequence {sequence} of "
            f"{header.sequences}: the two do not belong together"
        )


def _offsets(index: Blob, header: _Header, first: int, last: int, at: int) -> np.ndarray:
    """Byte offsets of the sequences first … last (the last one's is where the one before it ends), from `at` on."""
    count = last - first
    lengths = np.frombuffer(index.read(_HEADER.size + 4 * first, 4 * count), "<i4").astype(np.int64)
    offsets = np.frombuffer(index.read(header.offsets + 8 * first, 8 * count), "<i8")
    ends = at + np.concatenate([[0], np.cumsum(lengths * header.dtype.itemsize)])
    if (lengths < 0).any() or (offsets != ends[:-1]).any():
        raise UserError(f"{index.url} is damaged: its sequences do not lie one behind the other")
    return ends
