"""Messages of Arrow's IPC formats, found and measured before pyarrow is given them.

A message is 0xFFFFFFFF, the size of its metadata (int32), the metadata (a flatbuffer, `Message` of Message.fbs), and
its body; see https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format. The file format is the
same stream between "ARROW1" and a footer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from millrace.core.errors import UserError
from millrace.data.stores.base import Blob

MAX_BATCH = 2**30  # bytes of a batch, decompressed; `datasets` writes at most 1,000 rows at a time
_CONTINUES = 0xFFFFFFFF
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # MessageHeader
_MAX_METADATA = 16 * 2**20
_DAMAGED = (pa.ArrowException, OSError, EOFError, StopIteration, ValueError, MemoryError)  # what pyarrow raises


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its kind, and the bytes [start, stop) that it takes, with its body from `body` on."""

    kind: int
    start: int
    body: int
    stop: int


@dataclass(frozen=True, slots=True)
class Head:
    """What comes before the batches: `raw` has the schema and the dictionaries, `stop` is where they end."""

    names: list[str]
    raw: bytes
    stop: int


def read_head(blob: Blob) -> Head:
    """The schema and the dictionaries of a shard.

    Raises:
        UserError: not an Arrow file, or damaged.
    """
    at = 8 if blob.size >= 8 and blob.read(0, 8) == b"ARROW1\0\0" else 0
    message = next_message(blob, at)
    if not message or message.kind != _SCHEMA:
        raise UserError(f"{blob.url} is not an Arrow file: it does not begin with a schema")
    raw = blob.read(message.start, message.stop - message.start)
    try:
        names = pa.ipc.read_schema(pa.py_buffer(raw)).names
    except _DAMAGED as error:
        raise UserError(f"{blob.url}: the schema at byte {at} is damaged: {error}") from None
    at = message.stop
    while (message := next_message(blob, at)) and message.kind == _DICTIONARY:
        raw += _read(blob, message)
        at = message.stop
    return Head(names, raw, at)


def read_batch(blob: Blob, head: Head, message: Message, names: Sequence[str]) -> pa.RecordBatch:
    """The columns `names` of a record batch, checked so that none reaches beyond its buffers.

    Raises:
        UserError: it is damaged, or something else than a record batch.
    """
    if message.kind != _BATCH:
        raise UserError(
            f"{blob.url} has a dictionary or a schema among its batches, at byte {message.start}; "
            "write it anew without dictionaries"
        )
    stream = pa.BufferReader(head.raw + _read(blob, message))
    included = sorted({head.names.index(name) for name in names})
    options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=included)
    try:
        batch = pa.ipc.open_stream(stream, options=options).read_next_batch()
        for column in batch.columns:
            column.validate(full=pa.types.is_dictionary(column.type))
    except _DAMAGED as error:
        raise UserError(f"{blob.url}: the batch at byte {message.start} is damaged: {error}") from None
    return batch


def next_message(blob: Blob, at: int) -> Message | None:
    """The message at byte `at`; None at the mark that ends the stream.

    Raises:
        UserError: damaged, or cut short.
    """
    if at + 8 > blob.size:
        raise UserError(f"{blob.url} is cut short at byte {at}: the stream has no end mark")
    mark, size = struct.unpack("<Ii", blob.read(at, 8))
    if mark == _CONTINUES and size == 0:
        return None
    if mark != _CONTINUES or not 0 < size <= _MAX_METADATA:
        raise UserError(f"{blob.url}: there is no Arrow message at byte {at}")
    if at + 8 + size > blob.size:
        raise UserError(f"{blob.url} is cut short in the message at byte {at}")
    try:
        table = _Table(blob.read(at + 8, size))
        kind, body = table.number(1, "B"), table.number(3, "q")
    except struct.error:
        raise UserError(f"{blob.url}: the message at byte {at} is damaged") from None
    stop = at + 8 + size + body
    if body < 0 or stop > blob.size:
        raise UserError(f"{blob.url} is cut short in the message at byte {at}")
    return Message(kind, at, at + 8 + size, stop)


def _read(blob: Blob, message: Message) -> bytes:
    """The bytes of a batch; refuses one that is too large for memory, now or when it is decompressed."""
    size = message.stop - message.body
    if size <= MAX_BATCH:
        raw = blob.read(message.start, message.stop - message.start)
        try:
            size = _decompressed(raw[8 : message.body - message.start], raw[message.body - message.start :])
        except struct.error:
            raise UserError(f"{blob.url}: the batch at byte {message.start} is damaged") from None
    if size > MAX_BATCH:
        raise UserError(
            f"{blob.url}: the batch at byte {message.start} has {size} bytes, more than {MAX_BATCH}; write smaller ones"
        )
    return raw


def _decompressed(metadata: bytes, body: bytes) -> int:
    """Bytes that a batch takes in memory: a compressed buffer begins with its size (int64), or -1 if it is not."""
    table = _Table(metadata)
    header = table.table(2)
    if header and table.number(1, "B") == _DICTIONARY:
        header = header.table(1)
    if header is None or header.table(3) is None:
        return len(body)
    total = 0
    for offset, length in header.structs(2, "<qq"):
        size = struct.unpack_from("<q", body, offset)[0] if length else 0
        total += length if size == -1 else max(0, size)
    return total


class _Table:
    """A table of a flatbuffer (https://flatbuffers.dev/internals): fields by their number; struct.error if damaged."""

    def __init__(self, raw: bytes, at: int | None = None) -> None:
        self._raw = raw
        self._at = self._unpack("<I", 0) if at is None else at
        self._fields = self._at - self._unpack("<i", self._at)

    def number(self, field: int, kind: str) -> int:
        """An integer, 0 where the field is left out."""
        at = self._place(field)
        return self._unpack("<" + kind, at) if at else 0

    def table(self, field: int) -> _Table | None:
        """A table within."""
        at = self._place(field)
        return _Table(self._raw, at + self._unpack("<I", at)) if at else None

    def structs(self, field: int, kind: str) -> Iterator[tuple[int, ...]]:
        """A vector of structs."""
        at = self._place(field)
        if at:
            at += self._unpack("<I", at)
            for number in range(self._unpack("<I", at)):
                yield struct.unpack_from(kind, self._raw, at + 4 + number * struct.calcsize(kind))

    def _place(self, field: int) -> int:
        entry = 4 + 2 * field
        offset = self._unpack("<H", self._fields + entry) if entry < self._unpack("<H", self._fields) else 0
        return self._at + offset if offset else 0

    def _unpack(self, kind: str, at: int) -> int:
        if at < 0:
            raise struct.error("before the start")
        return int(struct.unpack_from(kind, self._raw, at)[0])
