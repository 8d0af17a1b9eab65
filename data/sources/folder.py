"""Folders of images, sounds or texts with a metadata file: the convention of `datasets`' imagefolder and audiofolder.

The shard is `metadata.jsonl` or `metadata.csv`; each of its rows is a sample that names files beside it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from millrace.core.errors import UserError
from millrace.data import MODALITIES
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
from millrace.data.sources.beside import open_named
from millrace.data.sources.columnar import wanted_columns
from millrace.data.sources.jsonl import lines, no_field, parse_line, too_long
from millrace.data.sources.ranges import read_ranges
from millrace.data.sources.recent import Recent
from millrace.data.sources.values import check_roles, to_value
from millrace.data.stores.base import Blob

_BLOCK_BITS = 16  # rows whose offsets share 64 KiB form a block; their files are read one by one in any case


class FolderSource(Source):
    """A place is (byte offset, length) of a row in the metadata file.

    Roles `image` and `audio` are columns that name files. So is `text` where its column is called `file_name` or
    `…_file_name`; else its column has the text itself. A sample whose file is missing, too large, or named by a path
    that leads out of the folder ('..', absolute, a URL, a link) is bad.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        super().__init__(columns)
        check_roles(columns, ("text", *MODALITIES, "bytes"), "a folder with a metadata file")
        self._wanted = [(role, name) for role, name in columns.items() if role != "bytes"]
        self._headers: Recent[list[str]] = Recent(256)  # columns of CSV files

    def scan(self, blob: Blob) -> Iterator[Sample]:
        """Stream the rows, and the files that they name."""
        fields = self._fields(blob)
        if fields:
            wanted_columns([name for _, name in self._wanted], fields, blob.url)
        with blob.open() as file:
            for number, (offset, raw, length) in enumerate(_records(file) if fields else lines(file)):
                if not raw.strip() or (fields and number == 0):
                    continue
                place = offset, length
                content = too_long(*place) if length > MAX_SAMPLE_BYTES else self._content(blob, raw, offset)
                yield Sample(place, content, text_bytes(content))

    def read(self, blob: Blob, places: Sequence[Place]) -> list[Content]:
        """Read each row, and the files that it names."""
        ranges = zip(read_ranges(blob, places), places, strict=True)
        return [self._content(blob, raw, offset) for raw, (offset, _) in ranges]

    def block(self, place: Place) -> int:
        """Rows that start in the same 64 KiB."""
        return place[0] >> _BLOCK_BITS

    def _fields(self, blob: Blob) -> list[str]:
        """Columns of a CSV file; none of a JSONL file, whose rows name theirs."""
        if not blob.url.partition("?")[0].lower().endswith(".csv"):
            return []
        return self._headers.get(blob.url, lambda: _header(blob))

    def _content(self, blob: Blob, raw: bytes | memoryview, offset: int) -> Content:
        fields, where = self._fields(blob), f"the row at byte {offset}"
        row = _parse_csv(raw, offset, fields) if fields else parse_line(raw, offset)
        if isinstance(row, BadSample):
            return row
        found: dict[str, Value] = {}
        for role, name in self._wanted:
            if not isinstance(row, dict) or name not in row:
                return no_field(row, name, where)
            named = role in MODALITIES or name == "file_name" or name.endswith("_file_name")
            value = _file(blob, role, row[name]) if named else check_text(row[name])
            if isinstance(value, BadSample):
                return BadSample(f"{where}: {value.why}")
            found[role] = value
        return found


def _file(blob: Blob, role: str, name: Any) -> Value | BadSample:
    """What the file `name` beside the shard holds."""
    if not isinstance(name, str):
        return BadSample(f"the file name is {type(name).__name__}, not a string")
    try:
        file = open_named(blob, name)
    except ValueError as error:
        return BadSample(str(error))
    with file:
        if file.size > MAX_SAMPLE_BYTES:
            return BadSample(f"the file '{name}' has {file.size} bytes, more than {MAX_SAMPLE_BYTES}")
        value = to_value(role, file.read(0, file.size))
    return BadSample(f"the file '{name}': {value.why}") if isinstance(value, BadSample) else value


def _records(file: io.BufferedReader) -> Iterator[tuple[int, bytes, int]]:
    """As `lines`, for CSV (RFC 4180): a field in quotes may have line feeds, so quotes must be even in number."""
    start, parts, size, quotes = 0, list[bytes](), 0, 0
    for offset, raw, length in lines(file):
        if size == 0:
            start = offset
        size += length
        quotes += raw.count(b'"')
        if size <= MAX_SAMPLE_BYTES:
            parts.append(raw)
        if quotes % 2 == 0:
            yield start, b"".join(parts), size
            parts, size = [], 0
    if size:
        yield start, b"".join(parts), size


def _header(blob: Blob) -> list[str]:
    with blob.open() as file:
        _, raw, length = next(_records(file), (0, b"", 0))
    text = decode(raw.removeprefix(b"\xef\xbb\xbf"))
    rows = (
        []
        if isinstance(text, BadSample) or length > MAX_SAMPLE_BYTES
        else list(csv.reader(io.StringIO(text, newline="")))
    )
    if not rows or not any(rows[0]):
        raise UserError(f"{blob.url} is not a CSV file with a row of column names")
    return rows[0]


def _parse_csv(raw: bytes | memoryview, offset: int, fields: Sequence[str]) -> dict[str, str] | BadSample:
    text = decode(raw, offset)
    if isinstance(text, BadSample):
        return text
    try:
        (values,) = csv.reader(io.StringIO(text, newline=""), strict=True)
    except (csv.Error, ValueError) as error:
        return BadSample(f"the row at byte {offset} is not CSV: {error}")
    if len(values) != len(fields):
        return BadSample(f"the row at byte {offset} has {len(values)} values, there are {len(fields)} columns")
    return dict(zip(fields, values, strict=True))
