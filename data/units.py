"""The work of `prepare`, unit by unit: a unit is a run of files that is indexed and counted as a whole.

A finished unit is a JSON record (written last, by rename) beside its index; an interrupted one leaves nothing
that is taken for finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millrace.core.errors import UserError
from millrace.core.registry import lookup
from millrace.core.rundir import write_atomic
from millrace.data import SOURCES
from millrace.data.index import COLUMNS, Entries, concatenate, to_table, write_parquet
from millrace.data.inputs import InputFile
from millrace.data.manifest import Shard
from millrace.data.reader import file_sha256
from millrace.data.sources.base import BadSample, Sample, Source, checksum
from millrace.data.stores.base import open_blob
from millrace.data.tokenizer import Tokenizer

UNIT_BYTES = 64 * 2**20  # small files are prepared together up to this size
_BATCH_DOCUMENTS, _BATCH_BYTES = 256, 2 * 2**20  # tokenised at a time
_GROUP_TOKENS = 2**18  # tokens in a row group of a tokenised shard
PARTS = ("train", "heldout")


@dataclass(frozen=True)
class UnitOptions:
    """What a unit's result depends on besides its files."""

    text: str
    tokenizer: Tokenizer | None  # None: do not count tokens
    tokenize: bool
    shard_size: int
    heldout: float
    heldout_by: str
    on_bad: str

    def key(self) -> dict[str, Any]:
        """Comparable form."""
        names = ("text", "tokenize", "shard_size", "heldout", "heldout_by")
        out = {name: getattr(self, name) for name in names}
        return out | {"tokenizer": self.tokenizer.sha256 if self.tokenizer else None}


def make_units(files: Sequence[InputFile]) -> list[list[InputFile]]:
    """Consecutive files, together at most `UNIT_BYTES` unless a single file is larger."""
    units: list[list[InputFile]] = []
    size = 0
    for file in files:
        if not units or size + file.size > UNIT_BYTES:
            units.append([])
            size = 0
        units[-1].append(file)
        size += file.size
    return units


def held_out(options: UnitOptions, number: int, raw: bytes) -> bool:
    """Whether a document (the `number`-th of its unit, with text `raw`) belongs to the held-out part."""
    if options.heldout <= 0:
        return False
    if options.heldout_by == "nth":
        every = round(1 / options.heldout)
        return number % every == every - 1
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") < options.heldout * 2**64


@dataclass(frozen=True)
class Document:
    """A usable document of a unit: where it lies, its text, and whether it is held out."""

    file: int  # number in the unit
    sample: Sample
    text: str
    heldout: bool


def documents(unit: Sequence[InputFile], options: UnitOptions, bad: list[str]) -> Iterator[Document]:
    """Stream a unit's documents; what is undecodable is appended to `bad`.

    Raises:
        UserError: an undecodable document where `on_bad` is "stop", or a file that cannot be read.
    """
    number = 0
    for index, file in enumerate(unit):
        try:
            for ordinal, sample in enumerate(_scan(file, options.text)):
                content = sample.content
                if isinstance(content, BadSample):
                    if options.on_bad == "stop":
                        raise UserError(
                            f"{file.path}, document {ordinal}: {content.why}; mend the file, or leave such "
                            "documents out with --on-bad skip"
                        )
                    bad.append(f"{file.path}, document {ordinal}: {content.why}")
                    continue
                text = content["text"]
                assert isinstance(text, str)
                held = held_out(options, number, text.encode())
                yield Document(index, sample, text, held)
                number += 1
        except OSError as error:
            raise UserError(str(error)) from None


def _scan(file: InputFile, text: str) -> Iterator[Sample]:
    with open_blob(file.path) as blob:
        yield from source_of(file, text).scan(blob)


def source_of(file: InputFile, text: str) -> Source:
    """A source that reads `file`."""
    made: Source = lookup(SOURCES, file.kind, "source")({"text": text})
    return made


@dataclass
class _Rows:
    """Index rows of one shard, in order, and its blocks. Memory: 40 bytes a sample."""

    count: int = 0
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
        self.count += 1
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

    def __init__(self, unit: Sequence[InputFile], options: UnitOptions, hashes: Mapping[str, str]) -> None:
        self._files, self._hashes = unit, hashes
        self._rows = [_Rows() for _ in unit]
        self._sources = [source_of(file, options.text) for file in unit]

    def add(self, document: Document, ids: np.ndarray | None) -> None:
        """Index one document."""
        place, cost = document.sample.place, 0 if ids is None else len(ids) + 1
        block = self._sources[document.file].block(place)
        check = checksum({"text": document.text})
        self._rows[document.file].add((*place, document.sample.bytes, cost, check), block)

    def finish(self) -> tuple[list[Shard], list[Entries]]:
        """Shards that hold a sample, and their entries."""
        shards, parts = [], []
        for file, rows in zip(self._files, self._rows, strict=True):
            if rows.count:
                parts.append(rows.finish())
                sha = self._hashes[str(file.path)]
                shards.append(_shard(file.path, file.kind, file.source, sha, rows))
        return shards, parts


def _shard(path: Path, kind: str, source: int, sha256: str, rows: _Rows) -> Shard:
    return Shard(
        url=str(path),
        kind=kind,
        source=source,
        size=path.stat().st_size,
        sha256=sha256,
        samples=rows.count,
        groups=rows.groups,
    )


class Tokenised:
    """Writes tokenised Parquet shards (columns `tokens`, `bytes`); a shard belongs to one source."""

    def __init__(self, stem: Path, unit: Sequence[InputFile], options: UnitOptions) -> None:
        assert options.tokenizer is not None
        small = options.tokenizer.vocab_size <= 2**16
        self._type = pa.list_(pa.uint16() if small else pa.int32())
        self._width = 2 if small else 4
        self._stem, self._unit, self._limit = stem, unit, options.shard_size
        self._shards: list[Shard] = []
        self._parts: list[Entries] = []
        self._open: tuple[pq.ParquetWriter, Path, int] | None = None  # writer, path, source
        self._rows = _Rows()
        self._group: list[tuple[np.ndarray, int]] = []
        self._group_number = self._shard_tokens = self._group_tokens = 0

    def add(self, document: Document, ids: np.ndarray | None) -> None:
        """Write one document."""
        assert ids is not None
        source = self._unit[document.file].source
        if self._open and (self._open[2] != source or self._shard_tokens * self._width >= self._limit):
            self._close()
        if not self._open:
            path = self._stem.with_name(f"{self._stem.name}-{len(self._shards):05d}.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            schema = pa.schema([("tokens", self._type), ("bytes", pa.int64())])
            self._open = pq.ParquetWriter(_temporary(path), schema, compression="zstd"), path, source
        place, ids = (self._group_number, len(self._group)), ids.astype(self._type.value_type.to_pandas_dtype())
        check = checksum({"tokens": ids})
        self._rows.add((*place, document.sample.bytes, len(ids) + 1, check), self._group_number)
        self._group.append((ids, document.sample.bytes))
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
        os.replace(_temporary(path), path)
        self._parts.append(self._rows.finish())
        self._shards.append(_shard(path, "parquet", source, file_sha256(path), self._rows))
        self._open, self._rows, self._group_number, self._shard_tokens = None, _Rows(), 0, 0

    def finish(self) -> tuple[list[Shard], list[Entries]]:
        """Shards that were written, and their entries."""
        self._close()
        return self._shards, self._parts


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def run_unit(
    number: int, unit: Sequence[InputFile], options: UnitOptions, out: Path, tick: Callable[[int], None]
) -> None:
    """Index (and tokenise) one unit into `out/.work/NNNNN.*`, the record last; `tick` gets bytes of text."""
    hashes = {str(file.path): file_sha256(file.path) for file in unit}
    sinks: dict[bool, InPlace | Tokenised] = {}
    for held, folder in ((False, out), (True, out / "heldout")):
        stem = folder / "shards" / f"{number:05d}"
        sinks[held] = Tokenised(stem, unit, options) if options.tokenize else InPlace(unit, options, hashes)
    bad: list[str] = []
    for batch in _batches(documents(unit, options, bad)):
        texts = [document.text for document in batch]
        ids = options.tokenizer.encode(texts) if options.tokenizer else [None] * len(batch)
        for document, tokens in zip(batch, ids, strict=True):
            sinks[document.heldout].add(document, tokens)
        tick(sum(document.sample.bytes for document in batch))
    record: dict[str, Any] = {"key": unit_key(unit, options), "skipped": bad, "hashes": hashes}
    for part, sink in zip(PARTS, sinks.values(), strict=True):
        shards, entries = sink.finish()
        write_parquet(to_table(concatenate(entries)), out / ".work" / f"{number:05d}.{part}.parquet")
        record[part] = {
            "shards": [asdict(shard) for shard in shards],
            "counts": [
                [s.source, s.samples, int(e.bytes.sum()), int(e.tokens.sum())]
                for s, e in zip(shards, entries, strict=True)
            ],
        }
    for file in unit:
        status = file.path.stat()
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise UserError(f"{file.path} changed while it was being read; run the same command again")
    write_atomic(out / ".work" / f"{number:05d}.json", json.dumps(record))


def unit_key(unit: Sequence[InputFile], options: UnitOptions) -> str:
    """Hash of everything that a unit's result depends on."""
    return hashlib.sha256(json.dumps([[f.key() for f in unit], options.key()]).encode()).hexdigest()


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in stream:
        batch.append(document)
        size += document.sample.bytes
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
