"""What a row group of Parquet takes in memory, from the headers of its pages, before anything is decompressed.

A page of zeros, or one long value that a dictionary holds once and a million rows name, is a small file. pyarrow has no
sizes to rely on: those in the footer are what its writer claims, and where the entry of a column is damaged, asking
pyarrow for it ends the process. The numbers of fields are those of
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from millrace.core.errors import UserError
from millrace.data.sources.thrift import DAMAGED, Struct, read_struct
from millrace.data.stores.base import Blob

_HEADER = 2**10  # bytes of a page's header that are read at first; it may hold long values as statistics
_LONGEST = 2**24
_DICTIONARY, _INDEX = 2, 1  # PageType


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
            footer, _ = read_struct(blob.read(max(0, blob.size - 8 - length), length), 0)
            self._groups = [[column[3] for column in group[1]] for group in footer[4]]
        except DAMAGED:
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
            except DAMAGED:
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
            return read_struct(raw, 0)
        except IndexError:  # longer than what was read
            if len(raw) < size or size >= _LONGEST:
                raise
            size *= 16


def _values(header: Struct) -> int:
    """Values of a data page, nulls too."""
    if header[1] in (_DICTIONARY, _INDEX):
        return 0
    return int((header.get(5) or header[8])[1])
