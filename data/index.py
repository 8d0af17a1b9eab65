"""The per-sample index of a manifest: place, bytes, token cost and checksum, in Parquet files of fixed length."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millrace.core.errors import UserError

CHUNK = 65536  # samples in an index file; file number = ordinal // CHUNK
COLUMNS = ("at", "extent", "bytes", "tokens", "check")
_CACHED_CHUNKS = 32


@dataclass(frozen=True)
class Entries:
    """Columns of the index for some samples, each int64 of shape (N,).

    `at`, `extent` are the place in the shard; `bytes` the size of the text; `tokens` the cost n + 1
    (0 where it was not counted); `check` the sample's checksum (`sources.base.checksum`).
    """

    at: np.ndarray
    extent: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray
    check: np.ndarray

    def __len__(self) -> int:
        return len(self.at)

    def digest(self) -> str:
        """SHA-256 of the columns' content."""
        sha = hashlib.sha256()
        for name in COLUMNS:
            sha.update(np.ascontiguousarray(getattr(self, name), "<i8").tobytes())
        return sha.hexdigest()


def to_entries(table: pa.Table) -> Entries:
    """Columns of an index table."""
    return Entries(*(table.column(name).to_numpy() for name in COLUMNS))


def to_table(entries: Entries) -> pa.Table:
    """An index table."""
    return pa.table({name: pa.array(getattr(entries, name), pa.int64()) for name in COLUMNS})


def concatenate(parts: Sequence[Entries]) -> Entries:
    """Entries of `parts`, in order."""
    return Entries(*(np.concatenate([np.empty(0, np.int64), *(getattr(p, n) for p in parts)]) for n in COLUMNS))


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a whole file, durably, under its final name only when complete."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    pq.write_table(table, temporary, compression="zstd")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_index(folder: Path, parts: Iterable[Entries]) -> list[dict[str, int | str]]:
    """Write `parts` as index files into `folder`; return {"samples", "sha256"} per file. Memory: one file."""
    folder.mkdir(parents=True, exist_ok=True)
    listed: list[dict[str, int | str]] = []
    for chunk in _rechunk(parts):
        write_parquet(to_table(chunk), folder / f"{len(listed):05d}.parquet")
        listed.append({"samples": len(chunk), "sha256": chunk.digest()})
    return listed


def _rechunk(parts: Iterable[Entries]) -> Iterator[Entries]:
    waiting, count = [], 0
    for part in parts:
        waiting.append(part)
        count += len(part)
        while count >= CHUNK:
            whole = concatenate(waiting)
            yield Entries(*(getattr(whole, name)[:CHUNK] for name in COLUMNS))
            waiting = [Entries(*(getattr(whole, name)[CHUNK:] for name in COLUMNS))]
            count -= CHUNK
    if count:
        yield concatenate(waiting)


class Index:
    """Reads entries by sample ordinal, keeping a bounded number of verified files in memory."""

    def __init__(self, folder: Path, digests: Sequence[str]) -> None:
        self._folder, self._digests = folder, digests
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

    def _chunk(self, number: int) -> Entries:
        if number not in self._chunks:
            path = self._folder / f"{number:05d}.parquet"
            try:
                entries = to_entries(pq.read_table(path, use_threads=False))
            except (OSError, pa.ArrowException, KeyError) as error:
                raise UserError(f"cannot read the index file {path}: {error}; run `millrace prepare` again") from None
            if entries.digest() != self._digests[number]:
                raise UserError(f"the index file {path} was altered after it was written; run `millrace prepare` again")
            self._chunks[number] = entries
            if len(self._chunks) > _CACHED_CHUNKS:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(number)
        return self._chunks[number]
