"""Plain text: one file is one document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from millrace.data.sources.base import BadSample, Content, Place, Sample, Source, decode


class TextSource(Source):
    """A place is (0, size); the document is the file's content, byte for byte."""

    def scan(self, path: Path) -> Iterator[Sample]:
        """Yield the one document."""
        raw = path.read_bytes()
        yield Sample((0, len(raw)), decode(raw), len(raw))

    def read(self, path: Path, places: Sequence[Place]) -> list[Content]:
        """Read the document."""
        raw = path.read_bytes()
        return [decode(raw) if len(raw) == size else BadSample("the file changed size") for _, size in places]
