"""The per-sample index of a manifest: place, bytes, cost and checksum, in Parquet files of fixed length.

Files are named by number and content, so that appending never changes one that a running reader of the older manifest
needs: where rows follow those of a file that is not full, a new file of that number holds them all.
"""

from __future__ import annotations

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
_CACHED_CHUNKS = 32
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
        return np.stack([getattr(self, name) for name in COLUMNS], axis=1).astype("<i8")

    def digest(self) -> str:
        """SHA-256 of the rows."""
        return hashlib.sha256(self.rows().tobytes()).hexdigest()

    def part(self, start: int, stop: int) -> Entries:
        """Entries [start, stop)."""
        return Entries(*(getattr(self, name)[start:stop] for name in COLUMNS))


def to_entries(table: pa.Table) -> Entries:
    """Columns of an index table."""
    return Entries(*(table.column(name).to_numpy() for name in COLUMNS))


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
    return f"{number:05d}-{chunk['sha256'][:16]}.parquet"


def write_index(folder: Path, parts: Iterable[Entries], full: Sequence[Chunk] = ()) -> list[Chunk]:
    """Write `parts` as index files behind the `full` ones that are there; list all files. Memory: one file."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = list(full)
    for entries in _rechunk(parts):
        chunk = {"samples": len(entries), "sha256": entries.digest()}
        write_parquet(to_table(entries), folder / index_file(len(listed), chunk))
        listed.append(chunk)
    fsync_folder(folder)
    return listed


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


class Index:
    """Reads entries by sample ordinal, keeping a bounded number of verified files in memory."""

    def __init__(self, folder: Path, chunks: Sequence[Chunk]) -> None:
        self._folder, self.listed = folder, list(chunks)
        self._chunks: OrderedDict[int, Entries] = OrderedDict()
        self._lock = threading.Lock()

    def lookup(self, samples: np.ndarray) -> Entries:
        """Entries of `samples` (ordinals, any order).

        Raises:
            UserError: an index file is missing or was altered.
        """
        out = np.empty((len(COLUMNS), len(samples)), np.int64)
        number = samples // CHUNK
        for chunk in np.unique(number):
            here = number == chunk
            with self._lock:
                entries = self._chunk(int(chunk))
            for row, name in enumerate(COLUMNS):
                out[row, here] = getattr(entries, name)[samples[here] - chunk * CHUNK]
        return Entries(*out)

    def path(self, number: int) -> Path:
        """Where index file `number` lies."""
        return self._folder / index_file(number, self.listed[number])

    def read(self, number: int) -> Entries:
        """All entries of index file `number`, verified; not kept in memory.

        Raises:
            UserError: the file is missing or was altered.
        """
        path = self.path(number)
        try:
            entries = to_entries(pq.read_table(path, use_threads=False))
        except (OSError, pa.ArrowException, KeyError) as error:
            raise UserError(f"cannot read the index file {path}: {error}; {_MEND}") from None
        if entries.digest() != self.listed[number]["sha256"]:
            raise UserError(f"the index file {path} was altered after it was written; {_MEND}")
        return entries

    def _chunk(self, number: int) -> Entries:
        if number not in self._chunks:
            self._chunks[number] = self.read(number)
            if len(self._chunks) > _CACHED_CHUNKS:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(number)
        return self._chunks[number]
