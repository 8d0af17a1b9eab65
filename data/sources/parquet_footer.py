"""Where the columns of a Parquet file lie, from its footer alone.

pyarrow tells it too, but ends the process where the footer is damaged (`RowGroupMetaData.column`). The numbers of its
fields are those of parquet-format/src/main/thrift/parquet.thrift.
"""

from __future__ import annotations

import numpy as np

from millrace.data.sources.thrift import DAMAGED, Struct, read_struct
from millrace.data.stores.base import Blob

_TAIL = 8  # bytes: the footer's length (uint32, little-endian) and "PAR1"
_END = 2**16  # bytes that pyarrow reads to find the footer
_MAX_FOOTER = 2**18  # larger ones take too long to take apart here
_ROW_GROUPS = 4  # of FileMetaData
_COLUMNS = 1  # of RowGroup
_META = 3  # of ColumnChunk
_PATH, _COMPRESSED, _DATA, _DICTIONARY = 3, 7, 9, 11  # of ColumnMetaData

Extents = list[dict[str, list[tuple[int, int]]]]
"""Of every row group, by column: (offset, length) of its chunks, several where the column is nested."""


def read_extents(blob: Blob) -> Extents:
    """Raises `ValueError` where the footer is damaged, or larger than 256 KiB; `StoreError` as `Blob.read`."""
    if blob.size < _TAIL:
        raise ValueError("no footer")
    size = int.from_bytes(blob.read(blob.size - _TAIL, 4), "little")
    if size > min(_MAX_FOOTER, blob.size - _TAIL):
        raise ValueError(f"a footer of {size} bytes")
    try:
        footer, _ = read_struct(blob.read(blob.size - _TAIL - size, size), 0)
        return [_extents(group) for group in footer[_ROW_GROUPS]]
    except DAMAGED as error:
        raise ValueError(f"the footer is damaged: {error}") from None


def _extents(group: Struct) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for column in group[_COLUMNS]:
        meta = column[_META]
        start = min(meta[_DATA], meta.get(_DICTIONARY) or meta[_DATA])
        found.setdefault(meta[_PATH][0].decode(), []).append((start, meta[_COMPRESSED]))
    return found


def ranges_of(extents: Extents, groups: np.ndarray, columns: list[str], size: int) -> np.ndarray:
    """(offset, length) of the chunks of `columns` in `groups`, and of the file's end; int64 of shape (n, 2)."""
    chunks = [
        chunk
        for group in groups.tolist()
        if group < len(extents)
        for name in columns
        for chunk in extents[group].get(name, ())
        if chunk[0] >= 0 and 0 < chunk[1] <= size - chunk[0]
    ]
    tail = min(size, _END)
    return np.array([*chunks, (size - tail, tail)], np.int64)
