"""Parquet: a column of text, or of token ids; read by row group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millrace.core.errors import UserError, did_you_mean
from millrace.data.sources.base import BadSample, Content, Place, Sample, Source, decode

_CACHE_BYTES = 512 * 2**20  # decoded row groups kept: a window visits `shuffle_blocks` of them, over and over


class ParquetSource(Source):
    """A place is (row group, row in it). Columns: `text`, or `tokens` (list of int) beside `bytes`."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        super().__init__(columns)
        self._wanted = [columns["tokens"], columns["bytes"]] if "tokens" in columns else [columns["text"]]
        self._groups: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()

    def scan(self, path: Path) -> Iterator[Sample]:
        """Stream one row group at a time."""
        with self._open(path) as file:
            for group in range(file.num_row_groups):
                row = 0
                for batch in file.iter_batches(1024, row_groups=[group], columns=self._wanted, use_threads=False):
                    table = self._prepare(pa.Table.from_batches([batch]), path)
                    for index in range(len(table)):
                        content = self._content(table, index, (group, row))
                        yield Sample((group, row), content, self._bytes(table, index, content))
                        row += 1

    def read(self, path: Path, places: Sequence[Place]) -> list[Content]:
        """Decode each row group once; the most recent ones stay in a bounded cache."""
        contents: list[Content] = []
        for group, members in groupby(places, key=lambda place: place[0]):
            table = self._group(path, group)
            contents += [self._content(table, place[1], place) for place in members]
        return contents

    def _open(self, path: Path) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is not a readable Parquet file: {error}") from None
        names = file.schema_arrow.names
        for name in self._wanted:
            if name not in names:
                hint = did_you_mean(name, names) or f"; its columns are: {', '.join(names)}"
                raise UserError(f"{path} has no column '{name}'{hint}")
        return file

    def _prepare(self, table: pa.Table, path: Path) -> pa.Table:
        """Text as bytes, so that what is not UTF-8 is met sample by sample."""
        name = self._wanted[0]
        kind = table.schema.field(name).type
        if "tokens" in self.columns:
            if not (pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)):
                raise UserError(f"{path}: column '{name}' is {kind}, not a list of integers")
            return table
        if pa.types.is_dictionary(kind):
            table = table.set_column(0, name, table.column(name).cast(kind.value_type))
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: column '{name}' is {kind}, not text; name the text column with `text`")
        binary = pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
        return table.set_column(0, name, table.column(name).cast(binary))

    def _content(self, table: pa.Table, index: int, place: Place) -> Content:
        value = table.column(0)[index]
        where = f"row {place[1]} of row group {place[0]}"
        if not value.is_valid:
            return BadSample(f"{where} is null")
        if "tokens" in self.columns:
            return np.asarray(value.values)
        text = decode(value.as_py())
        return BadSample(f"{where}: {text.why}") if isinstance(text, BadSample) else text

    def _bytes(self, table: pa.Table, index: int, content: Content) -> int:
        if "tokens" in self.columns:
            return int(table.column(1)[index].as_py() or 0)
        return len(content.encode()) if isinstance(content, str) else 0

    def _group(self, path: Path, group: int) -> pa.Table:
        key = (path, group)
        if key not in self._groups:
            with self._open(path) as file:
                table = file.read_row_group(group, columns=self._wanted[:1], use_threads=False)
            self._groups[key] = self._prepare(table.combine_chunks(), path)
            while len(self._groups) > 1 and sum(t.nbytes for t in self._groups.values()) > _CACHE_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]
