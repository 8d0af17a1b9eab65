"""The work of `prepare`, unit by unit: a unit is a run of files that is indexed and counted as a whole.

A finished unit is a JSON record (written last, by rename) beside its index; an interrupted one leaves nothing
that is taken for finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from millrace.core.errors import UserError
from millrace.core.registry import lookup
from millrace.core.rundir import write_atomic
from millrace.data import SOURCES
from millrace.data.costs import Costs
from millrace.data.index import concatenate, to_table, write_parquet
from millrace.data.inputs import InputFile, look, sha256_of
from millrace.data.shards import InPlace, Row, Tokenised
from millrace.data.sources.base import BadSample, Content, Record, Sample, Source
from millrace.data.sources.values import without_borders
from millrace.data.stores.base import open_blob
from millrace.data.tokenizer import Tokenizer

UNIT_BYTES = 64 * 2**20  # small files are prepared together up to this size
_BATCH_DOCUMENTS, _BATCH_BYTES = 256, 2 * 2**20  # tokenised at a time
PARTS = ("train", "heldout")


@dataclass(frozen=True, kw_only=True)
class UnitOptions:
    """What a unit's result depends on besides its files."""

    columns: Mapping[str, str]  # role -> column or field
    tokenizer: Tokenizer | None
    counted: bool  # whether costs are counted; without a tokenizer those of media alone
    costs: Costs
    tokenize: bool
    shard_size: int
    heldout: float
    heldout_by: str
    on_bad: str

    def key(self) -> dict[str, Any]:
        """Comparable form."""
        names = ("columns", "counted", "tokenize", "shard_size", "heldout", "heldout_by")
        out = {name: getattr(self, name) for name in names} | {"costs": self.costs.of(self.columns)}
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


def held_out(options: UnitOptions, number: int, record: Record) -> bool:
    """Whether a sample (the `number`-th of its unit) belongs to the held-out part; equal ones by hash do alike."""
    if options.heldout <= 0:
        return False
    if options.heldout_by == "nth":
        every = round(1 / options.heldout)
        return number % every == every - 1
    sha = hashlib.sha256()
    for role in sorted(record):
        value = record[role]
        if isinstance(value, np.ndarray):  # equal tokens may be stored in integers of different sizes
            value = value.astype("<i8").tobytes()
        sha.update(value.encode() if isinstance(value, str) else value)
    return int.from_bytes(sha.digest()[:8], "big") < options.heldout * 2**64


@dataclass(frozen=True)
class Document:
    """A usable sample of a unit: where it lies, its values, the positions of its media, whether it is held out."""

    file: int  # number in the unit
    sample: Sample
    record: Record
    media: int
    heldout: bool


def documents(unit: Sequence[InputFile], options: UnitOptions, bad: list[str]) -> Iterator[Document]:
    """Stream a unit's samples; what is unusable is appended to `bad`.

    Raises:
        UserError: an unusable sample where `on_bad` is "stop", or a file that cannot be read.
    """
    number = 0
    for index, file in enumerate(unit):
        try:
            for ordinal, sample in enumerate(scan_file(file, options.columns)):
                content, media = _measured(sample.content, options)
                if isinstance(content, BadSample):
                    if options.on_bad == "stop":
                        raise UserError(
                            f"{file.url}, document {ordinal}: {content.why}; mend the file, or leave such "
                            "documents out with --on-bad skip"
                        )
                    bad.append(f"{file.url}, document {ordinal}: {content.why}")
                    continue
                yield Document(index, sample, content, media, held_out(options, number, content))
                number += 1
        except OSError as error:
            raise UserError(str(error)) from None


def _measured(content: Content, options: UnitOptions) -> tuple[Content, int]:
    """A sample's values, and the positions of its media; or why it is bad."""
    if isinstance(content, BadSample):
        return content, 0
    ids, tokenizer = content.get("tokens"), options.tokenizer
    if isinstance(ids, np.ndarray) and len(ids) and tokenizer:
        wrong = ids.max() if ids.max() >= tokenizer.vocab_size else ids.min()
        if not 0 <= wrong < tokenizer.vocab_size:
            return BadSample(
                f"token {wrong} is outside the tokenizer's vocabulary of {tokenizer.vocab_size}; name the tokenizer "
                "that the tokens were made with"
            ), 0
    positions = options.costs.positions(content)
    return (positions, 0) if isinstance(positions, BadSample) else (content, positions)


def scan_file(file: InputFile, columns: Mapping[str, str]) -> Iterator[Sample]:
    """Stream the samples of a file."""
    with open_blob(file.url) as blob:
        yield from source_of(file, columns).scan(blob)


def source_of(file: InputFile, columns: Mapping[str, str]) -> Source:
    """A source that reads `file`."""
    made: Source = lookup(SOURCES, file.kind, "source")(columns)
    return made


def run_unit(
    number: int, unit: Sequence[InputFile], options: UnitOptions, out: Path, tick: Callable[[int], None]
) -> None:
    """Index (and tokenise) one unit into `out/.work/NNNNN.*`, the record last; `tick` gets bytes of samples.

    Raises:
        UserError: a bad sample (see `documents`), or a file that changed meanwhile.
        StoreError: a file that cannot be read.
    """
    hashes = {}
    for file in unit:
        with open_blob(file.url) as blob:
            hashes[file.url] = sha256_of(blob)
    sources = [source_of(file, options.columns) for file in unit]
    sinks: dict[bool, InPlace | Tokenised] = {}
    for held, folder in ((False, out), (True, out / "heldout")):
        if options.tokenize and options.tokenizer:
            stem = folder / "shards" / f"{number:05d}"
            sinks[held] = Tokenised(stem, unit, options.tokenizer.vocab_size, options.shard_size)
        else:
            sinks[held] = InPlace(unit, sources, hashes)
    bad: list[str] = []
    for batch in _batches(documents(unit, options, bad)):
        for document, row in zip(batch, _to_rows(batch, options), strict=True):
            sinks[document.heldout].add(row)
        tick(sum(_size(document) for document in batch))
    record: dict[str, Any] = {"key": unit_key(unit, options), "skipped": bad, "hashes": hashes}
    for part, sink in zip(PARTS, sinks.values(), strict=True):
        shards, entries = sink.finish()
        write_parquet(to_table(concatenate(entries)), out / ".work" / f"{number:05d}.{part}.parquet")
        record[part] = [asdict(shard) for shard in shards]
    for file in unit:
        if look(file.url) != (file.size, file.version):
            raise UserError(f"{file.url} changed while it was being read; run the same command again")
    write_atomic(out / ".work" / f"{number:05d}.json", json.dumps(record))


def _to_rows(batch: Sequence[Document], options: UnitOptions) -> list[Row]:
    """Count (and, where shards are written, tokenise) a batch."""
    records = [document.record for document in batch]
    sizes = [document.sample.bytes for document in batch]
    tokens: list[Any] = [()] * len(batch)
    if "tokens" in options.columns and options.tokenizer:
        bos, eos = options.tokenizer.bos_id, options.tokenizer.eos_id
        tokens = [without_borders(np.asarray(record["tokens"]), bos, eos) for record in records]
        sizes = options.tokenizer.text_bytes(tokens)
    elif "text" in options.columns and options.tokenizer and options.counted:
        tokens = list(options.tokenizer.encode([str(record["text"]) for record in records]))
    if options.tokenize:
        records = [{"tokens": ids} for ids in tokens]
    return [
        Row(d.file, d.sample.place, size, len(ids) + 1 + d.media if options.counted else 0, record)
        for d, size, ids, record in zip(batch, sizes, tokens, records, strict=True)
    ]


def unit_key(unit: Sequence[InputFile], options: UnitOptions) -> str:
    """Hash of everything that a unit's result depends on."""
    return hashlib.sha256(json.dumps([[f.key() for f in unit], options.key()]).encode()).hexdigest()


def _size(document: Document) -> int:
    """Bytes that a sample takes in memory, about."""
    values = document.record.values()
    return document.sample.bytes + sum(
        value.nbytes if isinstance(value, np.ndarray) else len(value) for value in values if not isinstance(value, str)
    )


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in stream:
        batch.append(document)
        size += _size(document)
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
