"""Arrow: IPC streams and files, such as the cache of `datasets`; read by record batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import numpy as np
import pyarrow as pa

from millrace.core.errors import UserError
from millrace.data.sources.base import BadSample, Content, Place, Sample, Source
from millrace.data.sources.columnar import Rows, tokens_of, wanted_columns
from millrace.data.sources.ipc import Head, Message, next_message, read_batch, read_head
from millrace.data.sources.recent import Recent
from millrace.data.stores.base import Blob

_MAGIC = b"ARROW1"  # begins and ends the file format
_CACHE_BYTES = 512 * 2**20  # batches kept: a window visits `shuffle_blocks` of them, over and over


class ArrowSource(Source):
    """A place is (byte offset of the record batch's message, row in it)."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        super().__init__(columns)
        self._heads: Recent[Head] = Recent(256)
        self._batches: Recent[tuple[Rows, int]] = Recent(_CACHE_BYTES, lambda kept: kept[1])

    def scan(self, blob: Blob) -> Iterator[Sample]:
        """Stream one record batch at a time."""
        at = self._head(blob).stop
        while message := next_message(blob, at):
            rows, _ = self._rows(blob, message, list(self.columns.values()))
            for row in range(rows.length):
                content = rows.record(row, _in_batch(at, row))
                yield Sample((at, row), content, rows.text_bytes(row, content))
            at = message.stop
        if blob.read(0, 6) == _MAGIC and blob.read(blob.size - 6, 6) != _MAGIC:
            raise UserError(f"{blob.url} is cut short: it has no footer")

    def read(self, blob: Blob, places: Sequence[Place]) -> list[Content]:
        """Decode each batch once; the most recent ones stay in a bounded cache. All rows of a damaged one are bad."""
        contents: list[Content] = []
        for at, group in groupby(places, key=lambda place: place[0]):
            members = list(group)
            try:
                contents += self._kept(blob, at).records([place[1] for place in members], partial(_in_batch, at))
            except UserError as error:
                contents += [BadSample(str(error)) for _ in members]
        return contents

    def tokens(self, blob: Blob, places: np.ndarray) -> list[np.ndarray] | None:
        """As `Source.tokens`."""
        return tokens_of(partial(self._kept, blob), places)

    def needs(self, places: np.ndarray) -> np.ndarray:
        """The batches."""
        return places[:, [0, 0]]

    def _kept(self, blob: Blob, at: int) -> Rows:
        return self._batches.get((blob.url, at), partial(self._at, blob, at))[0]

    def _at(self, blob: Blob, at: int) -> tuple[Rows, int]:
        wanted = [name for role, name in self.columns.items() if role != "bytes"]
        message = next_message(blob, at)
        if message is None:
            raise UserError(f"{blob.url} has no batch at byte {at}: it is not what was indexed")
        return self._rows(blob, message, wanted)

    def _rows(self, blob: Blob, message: Message, wanted: Sequence[str]) -> tuple[Rows, int]:
        head = self._head(blob)
        batch = read_batch(blob, head, message, wanted_columns(wanted, head.names, blob.url))
        rows = Rows(pa.Table.from_batches([batch]), self.columns, blob.url)
        return rows, max(rows.nbytes, message.stop - message.start)

    def _head(self, blob: Blob) -> Head:
        return self._heads.get(blob.url, lambda: read_head(blob))


def _in_batch(at: int, row: int) -> str:
    return f"row {row} of the batch at byte {at}"
