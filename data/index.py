"""The per-sample index of a manifest: place, bytes, cost and checksum, in Arrow files of fixed length.

They are uncompressed, each column in the narrowest type that holds it, and mapped into memory: a plan asks for samples
all over the corpus, and the ranks of a node share the pages. A process verifies a file once, when it first needs it.

Files are named by number and content, so that appending never changes one that a running reader of the older manifest
needs: where rows follow those of a file that is not full, a new file of that number holds them all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millrace.core.errors import UserError
from millrace.core.rundir import fsync_folder

CHUNK = 65536  # samples in an index file; file number = ordinal // CHUNK
COLUMNS = ("at", "extent", "bytes", "tokens", "check")
_MAPPED_CHUNKS = 256  # a rank that plans touches up to 0.4 MB of each
_MEND = "put it back, or run `millrace prepare` into a new folder"


@dataclass(frozen=True)
class Entries:
    """Columns of the index for some samples, each int64 of shape (N,).

    `at`, `extent` are the place in the shard; `bytes` the size of the text; `tokens` the cost in positions
    (`data.costs`; 0 where it was not counted); `check` the sample's checksum (`sources.base.checksum`).
    """

    at: np.ndarray
    extent: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray
    check: np.ndarray

    def __len__(self) -> int:
        return len(self.at)

    def rows(self) -> np.ndarray:
        """Row after row, int64 (little-endian) of shape (N, columns); the SHA-256 of these bytes names the content."""
        return np.stack([getattr(self, name) for name in COLUMNS], axis=1).astype("<i8", copy=False)

    def digest(self) -> str:
        """SHA-256 of the rows."""
        return hashlib.sha256(self.rows().data).hexdigest()

    def part(self, start: int, stop: int) -> Entries:
        """Entries [start, stop)."""
        return Entries(*(getattr(self, name)[start:stop] for name in COLUMNS))


def to_entries(table: pa.Table) -> Entries:
    """Columns of an index table."""
    return Entries(*(_values(table.column(name)).astype(np.int64) for name in COLUMNS))


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """A column as a view.

    By DLPack, since pyarrow's `to_numpy` imports pandas where that is installed, which takes longer than anything else
    before the first batch.
    """
    whole = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return np.asarray(np.from_dlpack(whole))


def to_table(entries: Entries) -> pa.Table:
    """An index table."""
    return pa.table({name: pa.array(getattr(entries, name), pa.int64()) for name in COLUMNS})


def concatenate(parts: Sequence[Entries]) -> Entries:
    """Entries of `parts`, in order."""
    return Entries(*(np.concatenate([np.empty(0, np.int64), *(getattr(p, n) for p in parts)]) for n in COLUMNS))


def publish(temporary: Path, path: Path) -> None:
    """Give a whole file its final name, durably."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a whole file, durably, under its final name only when complete."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    pq.write_table(table, temporary, compression="zstd")
    publish(temporary, path)


Chunk = dict[str, Any]
"""An index file as the manifest lists it: {"samples", "sha256"}."""


def index_file(number: int, chunk: Chunk) -> str:
    """Name of an index file."""
    return f"{number:05d}-{chunk['sha256'][:16]}.arrow"


def write_index(folder: Path, parts: Iterable[Entries], full: Sequence[Chunk] = ()) -> list[Chunk]:
    """Write `parts` as index files behind the `full` ones that are there; list all files. Memory: one file."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = list(full)
    for entries in _rechunk(parts):
        chunk = {"samples": len(entries), "sha256": entries.digest()}
        _write(entries, folder / index_file(len(listed), chunk))
        listed.append(chunk)
    fsync_folder(folder)
    return listed


def _write(entries: Entries, path: Path) -> None:
    table = pa.table({name: _narrow(getattr(entries, name)) for name in COLUMNS})
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with pa.ipc.new_file(temporary, table.schema) as file:
        file.write_table(table)
    publish(temporary, path)


def _narrow(column: np.ndarray) -> np.ndarray:
    """The same values in the narrowest unsigned type; int64 where one is negative, as checksums are."""
    return column.astype(np.min_scalar_type(column.max())) if column.min() >= 0 else column


def _rechunk(parts: Iterable[Entries]) -> Iterator[Entries]:
    waiting, count = [], 0
    for part in parts:
        waiting.append(part)
        count += len(part)
        if count >= CHUNK:
            whole = concatenate(waiting)
            for start in range(0, count - CHUNK + 1, CHUNK):
                yield whole.part(start, start + CHUNK)
            waiting, count = [whole.part(count - count % CHUNK, count)], count % CHUNK
    if count:
        yield concatenate(waiting)


def ascending(values: np.ndarray) -> np.ndarray:
    """Each of `values` once, ascending: `np.unique` hashes whole numbers, which takes several times as long."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


class Index:
    """Reads entries by sample ordinal, keeping a bounded number of verified files mapped."""

    def __init__(self, folder: Path, chunks: Sequence[Chunk]) -> None:
        self._folder, self.listed = folder, list(chunks)
        self._mapped: OrderedDict[int, pa.Table] = OrderedDict()
        self._verified: set[int] = set()
        self._lock = threading.Lock()

    def lookup(self, samples: np.ndarray, columns: Sequence[str] = COLUMNS) -> np.ndarray:
        """Columns of `samples` (ordinals, any order), int64 of shape (columns, N).

        Raises:
            UserError: an index file is missing or was altered.
        """
        out = np.empty((len(columns), len(samples)), np.int64)
        number, row = np.divmod(samples, CHUNK)
        for chunk in ascending(number).tolist():
            here = np.flatnonzero(number == chunk)
            with self._lock:
                table = self._chunk(chunk)
            for values, name in zip(out, columns, strict=True):
                values[here] = _values(table.column(name))[row[here]]
        return out

    def path(self, number: int) -> Path:
        """Where index file `number` lies."""
        return self._folder / index_file(number, self.listed[number])

    def read(self, number: int) -> Entries:
        """All entries of index file `number`, verified; not kept in memory.

        Raises:
            UserError: the file is missing or was altered.
        """
        table = self._open(number)
        with contextlib.suppress(TypeError, ValueError, BufferError):  # a flipped bit may change the type of a column
            entries = to_entries(table)
            if entries.digest() == self.listed[number]["sha256"]:
                return entries
        raise UserError(f"the index file {self.path(number)} was altered after it was written; {_MEND}")

    def _open(self, number: int) -> pa.Table:
        """Index file `number`, mapped; without a file descriptor that stays open."""
        path = self.path(number)
        try:
            with pa.memory_map(os.fspath(path)) as file:
                return pa.ipc.open_file(file).read_all().select(COLUMNS)
        except (OSError, pa.ArrowException, KeyError) as error:
            raise UserError(f"cannot read the index file {path}: {error}; {_MEND}") from None

    def _chunk(self, number: int) -> pa.Table:
        if number not in self._verified:
            self.read(number)
            self._verified.add(number)
        if number not in self._mapped:
            self._mapped[number] = self._open(number)
            if len(self._mapped) > _MAPPED_CHUNKS:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(number)
        return self._mapped[number]
