"""JSON lines: one object with a text field per line; read by byte offset."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence

from millrace.data.sources.base import (
    MAX_SAMPLE_BYTES,
    BadSample,
    Content,
    Place,
    Sample,
    Source,
    check_text,
    decode,
    text_bytes,
)
from millrace.data.stores.base import Blob

_BLOCK_BITS = 20  # lines whose offsets share a mebibyte form a block


class JsonlSource(Source):
    """A place is (byte offset, length) of a line; blank lines are not samples."""

    def scan(self, blob: Blob) -> Iterator[Sample]:
        """Stream the lines."""
        with blob.open() as file:
            for offset, raw, length in _lines(file):
                line = raw.rstrip(b"\r\n")
                if length > MAX_SAMPLE_BYTES:
                    why = f"the line at byte {offset} has {length} bytes, more than {MAX_SAMPLE_BYTES}; split it"
                    yield Sample((offset, length), BadSample(why), 0)
                elif line.strip():
                    content = self._parse(line, offset)
                    yield Sample((offset, len(line)), content, text_bytes(content))

    def read(self, blob: Blob, places: Sequence[Place]) -> list[Content]:
        """Read each line."""
        return [self._parse(blob.read(offset, length), offset) for offset, length in places]

    def block(self, place: Place) -> int:
        """Lines that start in the same mebibyte."""
        return place[0] >> _BLOCK_BITS

    def _parse(self, line: bytes, offset: int) -> Content:
        text = decode(line, offset)
        if isinstance(text, BadSample):
            return text
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            return BadSample(f"the line at byte {offset} is not JSON: {error}")
        name = self.columns["text"]
        if not isinstance(record, dict) or name not in record:
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            return BadSample(f"the line at byte {offset} has no field '{name}' (it has: {keys})")
        checked = check_text(record[name])
        if isinstance(checked, BadSample):
            return BadSample(f"the line at byte {offset}: {checked.why}")
        return {"text": checked}


def _lines(file: io.BufferedReader) -> Iterator[tuple[int, bytes, int]]:
    """(offset, the line or its first bytes, its length) of every line; a longer line is never held whole."""
    offset = 0
    while raw := file.readline(MAX_SAMPLE_BYTES + 2):
        length, part = len(raw), raw
        while not part.endswith(b"\n") and length > MAX_SAMPLE_BYTES and (part := file.readline(2**20)):
            length += len(part)
        yield offset, raw, length
        offset += length
