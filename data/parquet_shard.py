"""Parquet shards of samples' values, written row by row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millrace.data.index import publish
from millrace.data.sources.base import Value

_GROUP_BYTES, _GROUP_ROWS = 2**20, 4096  # of a row group: a block, whose samples are read together


class ParquetShard:
    """A Parquet file that appears under its name when it is closed. Memory: one row group."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.bytes = 0
        self._path, self._schema = path, schema
        self._temporary = path.with_name(f".{path.name}.tmp")
        media = [field.name for field in schema if field.type == pa.binary()]
        self._writer = pq.ParquetWriter(
            self._temporary,
            schema,
            compression="none" if media else "zstd",  # images and sounds are compressed already
            use_dictionary=False,
            write_statistics=False,
        )
        self._rows: list[Mapping[str, Value | None]] = []
        self._group = 0

    def add(self, record: Mapping[str, Value | None]) -> None:
        """Write a row."""
        self._rows.append(record)
        size = sum(map(_size, record.values()))
        self.bytes += size
        self._group += size
        if self._group >= _GROUP_BYTES or len(self._rows) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema), row_group_size=len(self._rows))
        self._rows, self._group = [], 0

    def close(self) -> None:
        """Write what is left, durably."""
        self._flush()
        self._writer.close()
        publish(self._temporary, self._path)


def _size(value: Value | None) -> int:
    if isinstance(value, str):
        return len(value.encode())
    return value.nbytes if isinstance(value, np.ndarray) else len(value or b"")
