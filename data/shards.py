"""What a unit of work makes: index rows that point into its files, or tokenised Parquet shards with theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millrace.data.index import COLUMNS, Entries, concatenate, publish
from millrace.data.inputs import InputFile, sha256_of
from millrace.data.manifest import Shard
from millrace.data.sources.base import Place, Record, Source, checksum
from millrace.data.stores.base import open_blob

_GROUP_TOKENS = 2**18  # tokens in a row group of a tokenised shard


@dataclass(frozen=True, slots=True)
class Row:
    """A sample to index: number of its file in the unit, its place there, its text's bytes, its cost, its values."""

    file: int
    place: Place
    bytes: int
    cost: int
    record: Record


@dataclass
class _Rows:
    """Index rows of one shard, in order, and its blocks. Memory: 40 bytes a sample."""

    groups: list[list[int]] = field(default_factory=list)  # [samples in a block, blocks], run-length encoded
    _rows: list[tuple[int, ...]] = field(default_factory=list)  # as `index.COLUMNS`
    _done: list[Entries] = field(default_factory=list)
    _block: int | None = None
    _in_block: int = 0

    def add(self, row: tuple[int, ...], block: int) -> None:
        if block != self._block:
            self._close()
            self._block = block
        self._in_block += 1
        self._rows.append(row)
        if len(self._rows) >= 2**16:
            self._compact()

    def _compact(self) -> None:
        self._done.append(Entries(*np.array(self._rows, np.int64).reshape(-1, len(COLUMNS)).T))
        self._rows = []

    def _close(self) -> None:
        if self._in_block:
            if self.groups and self.groups[-1][0] == self._in_block:
                self.groups[-1][1] += 1
            else:
                self.groups.append([self._in_block, 1])
        self._in_block = 0

    def finish(self) -> Entries:
        """All rows."""
        self._close()
        self._compact()
        return concatenate(self._done)


class InPlace:
    """Collects index rows that point into the input files."""

    def __init__(self, unit: Sequence[InputFile], sources: Sequence[Source], hashes: Mapping[str, str]) -> None:
        self._files, self._sources, self._hashes = unit, sources, hashes
        self._rows = [_Rows() for _ in unit]

    def add(self, row: Row) -> None:
        """Index one sample."""
        values = (*row.place, row.bytes, row.cost, checksum(row.record))
        self._rows[row.file].add(values, self._sources[row.file].block(row.place))

    def finish(self) -> tuple[list[Shard], list[Entries]]:
        """Shards that hold a sample, and their entries."""
        kept = [(file, rows.finish(), rows.groups) for file, rows in zip(self._files, self._rows, strict=True)]
        kept = [(file, entries, groups) for file, entries, groups in kept if len(entries)]
        shards = [_shard(file, self._hashes[file.url], entries, groups) for file, entries, groups in kept]
        return shards, [entries for _, entries, _ in kept]


def _shard(file: InputFile, sha256: str, entries: Entries, groups: list[list[int]]) -> Shard:
    return Shard(
        url=file.url,
        kind=file.kind,
        source=file.source,
        size=file.size,
        sha256=sha256,
        samples=len(entries),
        bytes=int(entries.bytes.sum()),
        tokens=int(entries.tokens.sum()),
        groups=groups,
        entries=entries.digest(),
    )


class Tokenised:
    """Writes tokenised Parquet shards (columns `tokens`, `bytes`); a shard belongs to one source."""

    def __init__(self, stem: Path, unit: Sequence[InputFile], vocab_size: int, shard_size: int) -> None:
        small = vocab_size <= 2**16
        self._type = pa.list_(pa.uint16() if small else pa.int32())
        self._width = 2 if small else 4
        self._stem, self._unit, self._limit = stem, unit, shard_size
        self._shards: list[Shard] = []
        self._parts: list[Entries] = []
        self._open: tuple[pq.ParquetWriter, Path, int] | None = None  # writer, path, source
        self._rows = _Rows()
        self._group: list[tuple[np.ndarray, int]] = []
        self._group_number = self._shard_tokens = self._group_tokens = 0

    def add(self, row: Row) -> None:
        """Write one sample, whose record is {"tokens": …}."""
        source = self._unit[row.file].source
        if self._open and (self._open[2] != source or self._shard_tokens * self._width >= self._limit):
            self._close()
        if not self._open:
            path = self._stem.with_name(f"{self._stem.name}-{len(self._shards):05d}.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            schema = pa.schema([("tokens", self._type), ("bytes", pa.int64())])
            self._open = pq.ParquetWriter(_temporary(path), schema, compression="zstd"), path, source
        ids = np.asarray(row.record["tokens"]).astype(self._type.value_type.to_pandas_dtype())
        place = (self._group_number, len(self._group))
        self._rows.add((*place, row.bytes, row.cost, checksum({"tokens": ids})), self._group_number)
        self._group.append((ids, row.bytes))
        self._shard_tokens += len(ids)
        self._group_tokens += len(ids)
        if self._group_tokens >= _GROUP_TOKENS or len(self._group) >= 4096:
            self._write_group()

    def _write_group(self) -> None:
        if self._group and self._open:
            values = np.concatenate([ids for ids, _ in self._group])
            offsets = np.cumsum([0, *(len(ids) for ids, _ in self._group)]).astype(np.int32)
            tokens = pa.ListArray.from_arrays(offsets, pa.array(values))
            sizes = pa.array([size for _, size in self._group], pa.int64())
            table = pa.table([tokens, sizes], names=["tokens", "bytes"])
            self._open[0].write_table(table, row_group_size=len(self._group))
            self._group_number += 1
        self._group, self._group_tokens = [], 0

    def _close(self) -> None:
        self._write_group()
        if not self._open:
            return
        writer, path, source = self._open
        writer.close()
        publish(_temporary(path), path)
        entries = self._rows.finish()
        self._parts.append(entries)
        with open_blob(path) as blob:
            file = InputFile(str(path), "parquet", source, blob.size, blob.version())
            self._shards.append(_shard(file, sha256_of(blob), entries, self._rows.groups))
        self._open, self._rows, self._group_number, self._shard_tokens = None, _Rows(), 0, 0

    def finish(self) -> tuple[list[Shard], list[Entries]]:
        """Shards that were written, and their entries."""
        self._close()
        return self._shards, self._parts


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
