"""JSON lines: one object per line, with text or token ids in its fields; read by byte offset."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from millrace.data.sources.base import (
    MAX_SAMPLE_BYTES,
    BadSample,
    Content,
    Place,
    Sample,
    Source,
    Value,
    check_text,
    decode,
    text_bytes,
)
from millrace.data.sources.ranges import read_ranges
from millrace.data.sources.values import check_roles
from millrace.data.stores.base import Blob

_BLOCK_BITS = 20  # lines whose offsets share a mebibyte form a block


class JsonlSource(Source):
    """A place is (byte offset, length) of a line; blank lines are not samples.

    Roles: `text` (a string) and `tokens` (a list of integers, given as int32; `bytes` may name the size of its text).
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        super().__init__(columns)
        check_roles(columns, ("text", "tokens", "bytes"), "a JSONL file")
        self._wanted = [(role, name) for role, name in columns.items() if role != "bytes"]

    def scan(self, blob: Blob) -> Iterator[Sample]:
        """Stream the lines."""
        with blob.open() as file:
            for offset, raw, length in lines(file):
                line = raw.rstrip(b"\r\n")
                if length > MAX_SAMPLE_BYTES:
                    yield Sample((offset, length), too_long(offset, length), 0)
                elif line.strip():
                    row = parse_line(line, offset)
                    content = self._content(row, offset)
                    yield Sample((offset, len(line)), content, self._size(row, content))

    def read(self, blob: Blob, places: Sequence[Place]) -> list[Content]:
        """Read each line, those that lie close at once."""
        ranges = zip(read_ranges(blob, places), places, strict=True)
        return [self._parse(raw, offset) for raw, (offset, _) in ranges]

    def ranges(self, blob: Blob, places: np.ndarray) -> np.ndarray:
        """The places."""
        return places

    def block(self, place: Place) -> int:
        """Lines that start in the same mebibyte."""
        return place[0] >> _BLOCK_BITS

    def _parse(self, line: bytes | memoryview, offset: int) -> Content:
        return self._content(parse_line(line, offset), offset)

    def _content(self, row: Any, offset: int) -> Content:
        if isinstance(row, BadSample):
            return row
        found: dict[str, Value] = {}
        for role, name in self._wanted:
            if not isinstance(row, dict) or name not in row:
                return no_field(row, name, f"the line at byte {offset}")
            value = check_text(row[name]) if role == "text" else _tokens(row[name])
            if isinstance(value, BadSample):
                return BadSample(f"the line at byte {offset}: {value.why}")
            found[role] = value
        return found

    def _size(self, row: Any, content: Content) -> int:
        size = row.get(self.columns.get("bytes", "")) if isinstance(row, dict) else None
        return size if isinstance(size, int) and size > 0 else text_bytes(content)


def lines(file: io.BufferedReader) -> Iterator[tuple[int, bytes, int]]:
    """(offset, the line or its first bytes, its length) of every line; a longer line is never held whole."""
    offset = 0
    while raw := file.readline(MAX_SAMPLE_BYTES + 2):
        length, part = len(raw), raw
        while not part.endswith(b"\n") and length > MAX_SAMPLE_BYTES and (part := file.readline(2**20)):
            length += len(part)
        yield offset, raw, length
        offset += length


def too_long(offset: int, length: int) -> BadSample:
    """Why a line of `length` bytes is not read."""
    return BadSample(f"the line at byte {offset} has {length} bytes, more than {MAX_SAMPLE_BYTES}; split it")


def no_field(row: Any, name: str, where: str) -> BadSample:
    """Why a value without the field `name` is of no use."""
    keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    return BadSample(f"{where} has no field '{name}' (it has: {keys}); options such as --text name another")


def parse_line(line: bytes | memoryview, offset: int) -> Any:
    """The JSON value in a line, or a `BadSample`."""
    text = decode(line, offset)
    if isinstance(text, BadSample):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadSample(f"the line at byte {offset} is not JSON: {error}")


def _tokens(ids: Any) -> np.ndarray | BadSample:
    try:
        values = np.array(ids, np.int64) if isinstance(ids, list) and {type(i) for i in ids} <= {int} else None
    except OverflowError:
        values = None
    if values is None or (len(values) and not -(2**31) <= values.min() <= values.max() < 2**31):
        return BadSample("the tokens are not a list of integers of 32 bits")
    return values.astype(np.int32)
