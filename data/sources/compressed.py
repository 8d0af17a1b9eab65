"""Compressed shards, read at offsets of their decompressed content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from millrace.data.sources.base import Content, Place, Sample
from millrace.data.sources.jsonl import JsonlSource
from millrace.data.sources.recent import Recent
from millrace.data.stores.base import Blob
from millrace.data.stores.cache import inflate

_RATIO = 100  # text shrinks to a third or a tenth, logs to a fiftieth; a bomb to a thousandth
_FLOOR = 64 * 2**20  # bytes that any file may hold
_OPEN = 16  # decompressed shards kept open


class Plain:
    """Decompressed content of shards. The limit follows from the shard's size, so reading refuses what a scan would."""

    def __init__(self) -> None:
        self._open: Recent[Blob] = Recent(_OPEN)

    def of(self, blob: Blob, compression: Literal["gz", "zst"]) -> Blob:
        """A blob over the decompressed content of `blob`, kept open for the next call.

        Raises:
            StoreError: damaged, or a bomb: more than 100 times the shard's size, and more than 64 MiB.
        """
        limit = max(_FLOOR, _RATIO * blob.size)
        return self._open.get((blob.url, blob.version()), lambda: inflate(blob, compression, limit))


class _CompressedJsonl(JsonlSource):
    """A place is (byte offset, length) of a line in the decompressed text."""

    compression: Literal["gz", "zst"]

    def __init__(self, columns: Mapping[str, str]) -> None:
        super().__init__(columns)
        self._plain = Plain()

    def scan(self, blob: Blob) -> Iterator[Sample]:
        """Stream the lines."""
        return super().scan(self._plain.of(blob, self.compression))

    def read(self, blob: Blob, places: Sequence[Place]) -> list[Content]:
        """Read each line."""
        return super().read(self._plain.of(blob, self.compression), places)

    def ranges(self, blob: Blob, places: np.ndarray) -> np.ndarray:
        """None: it is decompressed as a whole."""
        return places[:0]


class JsonlGzSource(_CompressedJsonl):
    """JSON lines in a .gz file, of one member or several."""

    compression = "gz"


class JsonlZstSource(_CompressedJsonl):
    """JSON lines in a .zst file, of one frame or several."""

    compression = "zst"
