"""What a row group of Parquet takes in memory, from the headers of its pages, before anything is decompressed.

A page of zeros, or one long value that a dictionary holds once and a million rows name, is a small file. pyarrow has no
sizes to rely on: those in the footer are what its writer claims, and where the entry of a column is damaged, asking
pyarrow for it ends the process. Footer and headers are structs of Thrift's compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md), with the fields of
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from millrace.core.errors import UserError
from millrace.data.stores.base import Blob

_HEADER = 2**10  # bytes of a page's header that are read at first; it may hold long values as statistics
_LONGEST = 2**24
_DEPTH = 16
_DICTIONARY, _INDEX = 2, 1  # PageType
_DAMAGED = (LookupError, TypeError, AttributeError, ValueError, OverflowError)  # what a lie leads to here

Struct = dict[int, Any]
"""Values by the number of their field: integers, bytes, lists, structs."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Of some columns of a row group: bytes of the pages, number of values, bytes of the largest dictionary."""

    bytes: int
    values: int
    dictionary: int


class Pages:
    """The pages of a shard."""

    def __init__(self, blob: Blob) -> None:
        """Raises `UserError` where there is no footer."""
        self._blob = blob
        length = int.from_bytes(blob.read(blob.size - 8, 4), "little") if blob.size > 8 else 0
        try:
            footer, _ = _struct(blob.read(max(0, blob.size - 8 - length), length), 0)
            self._groups = [[column[3] for column in group[1]] for group in footer[4]]
        except _DAMAGED:
            raise UserError(f"{blob.url} is not a readable Parquet file: its footer is damaged") from None

    def measure(self, group: int, columns: Collection[str]) -> Measure:
        """Sizes of a row group.

        Raises:
            UserError: it is damaged.
        """
        size = values = dictionary = 0
        with self._blob.open() as file:
            try:
                for column in self._groups[group]:
                    if column[3][0].decode() in columns:
                        for header in _headers(file, column):
                            size += header[2]
                            values += _values(header)
                            dictionary = max(dictionary, header[2] if header[1] == _DICTIONARY else 0)
            except _DAMAGED:
                raise UserError(f"{self._blob.url}: row group {group} is damaged: a page has no header") from None
        return Measure(size, values, dictionary)


def _headers(file: BinaryIO, column: Struct) -> Iterator[Struct]:
    """PageHeader of every page of a column (ColumnMetaData), where pyarrow looks for them."""
    first, dictionary = column[9], column.get(11, 0)
    at = dictionary if 0 < dictionary < first else first
    stop, left = at + column[7], column[5]
    while at < stop and left > 0:
        header, length = _header(file, at)
        if min(at, header[2], header[3]) < 0:
            raise ValueError("a negative size")
        yield header
        left -= _values(header)
        at += length + header[3]


def _header(file: BinaryIO, at: int) -> tuple[Struct, int]:
    """A header and its length."""
    size = _HEADER
    while True:
        file.seek(max(0, at))
        raw = file.read(size)
        try:
            return _struct(raw, 0)
        except IndexError:  # longer than what was read
            if len(raw) < size or size >= _LONGEST:
                raise
            size *= 16


def _values(header: Struct) -> int:
    """Values of a data page, nulls too."""
    if header[1] in (_DICTIONARY, _INDEX):
        return 0
    return int((header.get(5) or header[8])[1])


def _struct(raw: bytes, at: int, depth: int = 0) -> tuple[Struct, int]:
    """The struct at byte `at`, and where it ends."""
    found: Struct = {}
    number = 0
    if depth > _DEPTH:
        raise ValueError("nested too deep")
    while head := raw[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(raw, at)
        kind = head & 15
        found[number], at = (kind == 1, at) if kind in (1, 2) else _value(raw, at, kind, depth)
    return found, at + 1


def _value(raw: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (4, 5, 6):
        return _integer(raw, at)
    if kind == 8:
        length, at = _varint(raw, at)
        if at + length > len(raw):
            raise IndexError
        return raw[at : at + length], at + length
    if kind in (9, 10):
        return _list(raw, at, depth)
    if kind == 12:
        return _struct(raw, at, depth + 1)
    if kind in (1, 2, 3, 7):  # booleans in a list, bytes, doubles
        return None, at + (8 if kind == 7 else 1)
    raise ValueError(f"type {kind}, which Parquet has not")


def _list(raw: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    count, kind = raw[at] >> 4, raw[at] & 15
    at += 1
    if count == 15:
        count, at = _varint(raw, at)
    if count > len(raw):
        raise IndexError
    values = []
    for _ in range(count):
        value, at = _value(raw, at, kind, depth + 1)
        values.append(value)
    return values, at


def _integer(raw: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(raw, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = raw[at]
    at += 1
    if value < 128:
        return value, at
    value &= 127
    for shift in range(7, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("an integer of more than 64 bits")
