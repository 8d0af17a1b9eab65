"""JSON lines: one object with a text field per line; read by byte offset."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from millrace.data.sources.base import BadSample, Content, Place, Sample, Source, check_text, decode

_BLOCK_BITS = 20  # lines whose offsets share a mebibyte form a block


class JsonlSource(Source):
    """A place is (byte offset, length) of a line; blank lines are not samples."""

    def scan(self, path: Path) -> Iterator[Sample]:
        """Stream the lines."""
        offset = 0
        with open(path, "rb") as file:
            for raw in file:
                line = raw.rstrip(b"\r\n")
                if line.strip():
                    content = self._parse(line, offset)
                    size = len(content.encode()) if isinstance(content, str) else 0
                    yield Sample((offset, len(line)), content, size)
                offset += len(raw)

    def read(self, path: Path, places: Sequence[Place]) -> list[Content]:
        """Seek to each line."""
        contents: list[Content] = []
        with open(path, "rb") as file:
            for offset, length in places:
                file.seek(offset)
                contents.append(self._parse(file.read(length), offset))
        return contents

    def block(self, place: Place) -> int:
        """Lines that start in the same mebibyte."""
        return place[0] >> _BLOCK_BITS

    def _parse(self, line: bytes, offset: int) -> str | BadSample:
        text = decode(line, offset)
        if isinstance(text, BadSample):
            return text
        try:
            record = json.loads(text)
        except ValueError as error:
            return BadSample(f"the line at byte {offset} is not JSON: {error}")
        name = self.columns["text"]
        if not isinstance(record, dict) or name not in record:
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            return BadSample(f"the line at byte {offset} has no field '{name}' (it has: {keys})")
        checked = check_text(record[name])
        return BadSample(f"the line at byte {offset}: {checked.why}") if isinstance(checked, BadSample) else checked
