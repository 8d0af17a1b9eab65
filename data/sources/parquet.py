"""Parquet: columns of text, of token ids or of files; read by row group."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq

from millrace.core.errors import UserError
from millrace.data.sources.base import Content, Place, Sample, Source
from millrace.data.sources.columnar import Rows, wanted_columns
from millrace.data.stores.base import Blob

_CACHE_BYTES = 512 * 2**20  # decoded row groups kept: a window visits `shuffle_blocks` of them, over and over


class ParquetSource(Source):
    """A place is (row group, row in it)."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        super().__init__(columns)
        self._groups: OrderedDict[tuple[str, int], Rows] = OrderedDict()
        self._lock = threading.Lock()

    def scan(self, blob: Blob) -> Iterator[Sample]:
        """Stream one row group at a time."""
        with self._open(blob) as file:
            wanted = wanted_columns(self.columns, file.schema_arrow.names, blob.url)
            for group in range(file.num_row_groups):
                row = 0
                for batch in file.iter_batches(1024, row_groups=[group], columns=wanted, use_threads=False):
                    rows = Rows(pa.Table.from_batches([batch]), self.columns, blob.url)
                    for index in range(rows.length):
                        content = rows.record(index, _where((group, row)))
                        yield Sample((group, row), content, rows.text_bytes(index, content))
                        row += 1

    def read(self, blob: Blob, places: Sequence[Place]) -> list[Content]:
        """Decode each row group once; the most recent ones stay in a bounded cache."""
        contents: list[Content] = []
        for group, members in groupby(places, key=lambda place: place[0]):
            rows = self._group(blob, group)
            contents += [rows.record(place[1], _where(place)) for place in members]
        return contents

    def _open(self, blob: Blob) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(blob.open(), pre_buffer=blob.path() is None)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{blob.url} is not a readable Parquet file: {error}") from None

    def _group(self, blob: Blob, group: int) -> Rows:
        key = (blob.url, group)
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
        with self._open(blob) as file:
            wanted = [name for role, name in self.columns.items() if role != "bytes"]
            table = file.read_row_group(group, columns=wanted, use_threads=False)
        rows = Rows(table, self.columns, blob.url)
        with self._lock:
            self._groups[key] = rows
            while len(self._groups) > 1 and sum(r.nbytes for r in self._groups.values()) > _CACHE_BYTES:
                self._groups.popitem(last=False)
        return rows


def _where(place: Place) -> str:
    return f"row {place[1]} of row group {place[0]}"
