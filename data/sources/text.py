"""Plain text: one file is one document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from millrace.data.sources.base import MAX_SAMPLE_BYTES, BadSample, Content, Place, Sample, Source, decode
from millrace.data.stores.base import Blob


class TextSource(Source):
    """A place is (0, size); the document is the file's content, byte for byte."""

    def scan(self, blob: Blob) -> Iterator[Sample]:
        """Yield the one document."""
        yield Sample((0, blob.size), self._read(blob), blob.size)

    def read(self, blob: Blob, places: Sequence[Place]) -> list[Content]:
        """Read the document."""
        return [
            self._read(blob) if blob.size == size else BadSample(f"the file has {blob.size} bytes, it had {size}")
            for _, size in places
        ]

    def ranges(self, blob: Blob, places: np.ndarray) -> np.ndarray:
        """The places."""
        return places

    def _read(self, blob: Blob) -> Content:
        if blob.size > MAX_SAMPLE_BYTES:
            return BadSample(f"{blob.size} bytes in one document, more than {MAX_SAMPLE_BYTES}; split the file")
        text = decode(blob.read(0, blob.size))
        return text if isinstance(text, BadSample) else {"text": text}
