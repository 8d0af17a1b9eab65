"""Parquet: columns of text, of token ids or of files; read by row group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millrace.core.errors import UserError
from millrace.data.sources.base import BadSample, Content, Place, Sample, Source
from millrace.data.sources.columnar import Rows, tokens_of, wanted_columns
from millrace.data.sources.parquet_footer import Extents, ranges_of, read_extents
from millrace.data.sources.parquet_pages import Pages
from millrace.data.sources.recent import Recent
from millrace.data.stores.base import Blob, StoreError

_CACHE_BYTES = 512 * 2**20  # decoded row groups kept: a window visits `shuffle_blocks` of them, over and over
_BUFFER = 4096  # bytes; pyarrow asks for whole column chunks, and what is read beyond them is read in vain
_MAX_GROUP = 2**32  # bytes of a row group, decompressed
_MAX_BATCH = 2**28  # bytes of the rows that a scan decodes together, if each were as long as the dictionary


class ParquetSource(Source):
    """A place is (row group, row in it)."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        super().__init__(columns)
        self._groups: Recent[Rows] = Recent(_CACHE_BYTES, lambda rows: rows.nbytes)
        self._extents: Recent[Extents] = Recent(1024)

    def scan(self, blob: Blob) -> Iterator[Sample]:
        """Stream one row group at a time."""
        with _open(blob) as file:
            wanted = wanted_columns(list(self.columns.values()), file.schema_arrow.names, blob.url)
            pages = Pages(blob)
            for group in range(file.num_row_groups):
                _check_size(blob, file, group)
                row = size = 0
                batches = file.iter_batches(
                    _rows_at_once(blob, pages, group, wanted), row_groups=[group], columns=wanted, use_threads=False
                )
                while (batch := _sound(blob, group, partial(next, batches, None))) is not None:
                    size += batch.nbytes
                    _refuse_large(blob, group, size)
                    rows = Rows(pa.Table.from_batches([batch]), self.columns, blob.url)
                    for index in range(rows.length):
                        content = rows.record(index, _in_group(group, row))
                        yield Sample((group, row), content, rows.text_bytes(index, content))
                        row += 1

    def read(self, blob: Blob, places: Sequence[Place]) -> list[Content]:
        """Decode each row group once; the most recent stay in a bounded cache. All rows of a damaged one are bad."""
        contents: list[Content] = []
        for group, places_in_it in groupby(places, key=lambda place: place[0]):
            members = list(places_in_it)
            try:
                contents += self._kept(blob, group).records([place[1] for place in members], partial(_in_group, group))
            except UserError as error:
                contents += [BadSample(str(error)) for _ in members]
        return contents

    def tokens(self, blob: Blob, places: np.ndarray) -> list[np.ndarray] | None:
        """As `Source.tokens`."""
        return tokens_of(partial(self._kept, blob), places)

    def ranges(self, blob: Blob, places: np.ndarray) -> np.ndarray:
        """The wanted columns of the row groups, and the footer; none where that cannot be taken apart."""
        names = [name for role, name in self.columns.items() if role != "bytes"]
        try:
            extents = self._extents.get(blob.url, partial(read_extents, blob))
        except ValueError:
            return places[:0]
        return ranges_of(extents, np.unique(places[:, 0]), names, blob.size)

    def needs(self, places: np.ndarray) -> np.ndarray:
        """The row groups."""
        return places[:, [0, 0]]

    def _kept(self, blob: Blob, group: int) -> Rows:
        return self._groups.get((blob.url, group), partial(self._group, blob, group))

    def _group(self, blob: Blob, group: int) -> Rows:
        with _open(blob) as file:
            names = [name for role, name in self.columns.items() if role != "bytes"]
            wanted = wanted_columns(names, file.schema_arrow.names, blob.url)
            _check_size(blob, file, group)
            table = _sound(blob, group, partial(file.read_row_group, group, columns=wanted, use_threads=False))
        rows: Rows = _sound(blob, group, partial(Rows, table, self.columns, blob.url))
        return rows


def _open(blob: Blob) -> pq.ParquetFile:
    path = blob.path()
    try:
        # Arrow's own file where it can be: through Python's all is copied once more, under the interpreter's lock.
        file = pq.ParquetFile(pa.OSFile(str(path)) if path else blob.open(_BUFFER), pre_buffer=path is None)
        assert file.schema_arrow.names is not None  # decodes them
        return file
    except StoreError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{blob.url} is not a readable Parquet file: {error}") from None


def _check_size(blob: Blob, file: pq.ParquetFile, group: int) -> None:
    """Refuse what is too large for memory, as the footer has it, before it is decompressed.

    The sizes of single columns are not asked for: where the footer is damaged, pyarrow ends the process.
    """
    _refuse_large(blob, group, _sound(blob, group, lambda: file.metadata.row_group(group).total_byte_size))


def _rows_at_once(blob: Blob, pages: Pages, group: int, columns: Sequence[str]) -> int:
    """Rows to decode together: few where a dictionary has long values, which any number of rows may name.

    Refuses what is too large for memory, as the headers of the pages have it: the footer may lie.
    """
    found = pages.measure(group, columns)
    _refuse_large(blob, group, found.bytes + 8 * found.values)
    return max(1, min(1024, _MAX_BATCH // max(1, found.dictionary)))


def _refuse_large(blob: Blob, group: int, size: int) -> None:
    if size > _MAX_GROUP:
        raise UserError(
            f"{blob.url}: row group {group} has {size} bytes, more than {_MAX_GROUP}; write smaller row groups"
        )


def _sound(blob: Blob, group: int, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except StoreError:
        raise
    except (pa.ArrowException, OSError, MemoryError, IndexError) as error:
        raise UserError(f"{blob.url}: row group {group} is damaged: {error}") from None


def _in_group(group: int, row: int) -> str:
    return f"row {row} of row group {group}"
