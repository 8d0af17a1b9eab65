"""Media as codes: files of images and sounds are encoded, once, into Parquet shards of text and packed codes.

What encodes is handed in (`Coder`): nothing here knows a model. A file becomes shards of its own, one rank's work; so
shards are the same whatever the number of ranks. What is done is written behind every shard (`FILE.json`), and an
interrupted file is continued there: batches begin anew with every shard, so that what comes out is the same, too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from millrace.core.errors import UserError
from millrace.core.rundir import write_atomic
from millrace.data import CODES
from millrace.data.inputs import InputFile, Progress, look
from millrace.data.modalities.base import View, modality
from millrace.data.modalities.codes import pack
from millrace.data.parquet_shard import ParquetShard
from millrace.data.sources.base import BadSample, Content, Record
from millrace.data.units import scan_file

_BATCH_SAMPLES, _BATCH_BYTES = 32, 32 * 2**20  # of decoded media that are held, and encoded together
_NEW = "; prepare into a new folder"


class Coder(Protocol):
    """What makes codes of the media of one role."""

    @property
    def sha256(self) -> str:
        """Of all that the codes depend on: weights, configuration, view."""

    @property
    def view(self) -> View:
        """How it looks at a medium; without anything random."""

    def encode(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes of each of what the view made; integers of any shape."""

    def save(self, folder: Path) -> None:
        """Write into an empty folder what decodes the codes later."""


@dataclass(frozen=True, kw_only=True)
class Coding:
    """What becomes of the media of files, and which rank of how many this is."""

    columns: Mapping[str, str]  # role -> column or field of the files
    coders: Mapping[str, Coder]  # by role
    shard_size: int  # bytes of values
    on_bad: str  # "stop" or "skip"
    progress: Progress
    rank: int = 0
    size: int = 1

    @property
    def roles(self) -> dict[str, str]:
        """The role, and the column, that the value of each role has in the shards: of what is not coded, its own."""
        return {role: CODES[role] if role in self.coders else role for role in self.columns}


@dataclass(frozen=True)
class _State:
    """How far a file is; `key` is the file's."""

    key: list[Any]
    shards: int = 0
    samples: int = 0  # that were read, bad ones too
    bad: list[str] = field(default_factory=list)
    done: bool = False

    @classmethod
    def of(cls, file: InputFile, folder: Path) -> _State:
        path = _stem(file.url, folder).with_suffix(".json")
        return cls(**json.loads(path.read_text())) if path.exists() else cls(file.key())

    def write(self, folder: Path) -> None:
        write_atomic(_stem(self.key[0], folder).with_suffix(".json"), json.dumps(asdict(self)))


def _stem(url: str, folder: Path) -> Path:
    return folder / hashlib.sha256(url.encode()).hexdigest()[:16]


def _shard(url: str, folder: Path, number: int) -> Path:
    stem = _stem(url, folder)
    return stem.with_name(f"{stem.name}-{number:05d}.parquet")


def begin(files: Sequence[InputFile], folder: Path, indexed: Collection[str]) -> None:
    """Make `folder` ready for the shards of `files`; what files left there that changed or are gone is removed.

    Raises:
        UserError: such a file, whose shards are among those that were `indexed` (URLs).
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = {file.url: file.key() for file in files}
    for path in sorted(folder.glob("*.json")):
        state = _State(**json.loads(path.read_text()))
        url = state.key[0]
        if keys.get(url) == state.key:
            continue
        shards = [_shard(url, folder, number) for number in range(state.shards)]
        if any(str(shard) in indexed for shard in shards):
            what = "changed" if url in keys else "is gone"
            raise UserError(f"{url} {what} since its media were encoded{_NEW}, or put the old file back")
        path.unlink()
        for shard in shards:
            shard.unlink(missing_ok=True)


def encode_files(files: Sequence[InputFile], folder: Path, coding: Coding) -> None:
    """Encode this rank's share of `files` into shards in `folder`, which `begin` made ready.

    Memory: a batch of samples and a row group.

    Raises:
        UserError: a sample that cannot be read or encoded where `on_bad` is "stop", or a file that changed meanwhile.
        StoreError: a file that cannot be read.
    """
    mine = files[coding.rank :: coding.size]
    total, before = sum(file.size for file in mine), 0
    for file in mine:

        def tick(count: int, before: int = before, size: int = file.size) -> None:
            coding.progress("encoding media", before + min(count, size), total)

        state = _State.of(file, folder)
        if not state.done:
            _encode_file(file, folder, state, coding, tick)
        before += file.size
        coding.progress("encoding media", before, total)


def encoded(files: Sequence[InputFile], folder: Path) -> tuple[list[InputFile], list[str]]:
    """The shards of `files`, as files of the same sources, and the samples that were left out, and why."""
    shards, bad = [], []
    for file in files:
        state = _State.of(file, folder)
        assert state.done, "every rank did its share"
        bad += state.bad
        for number in range(state.shards):
            url = str(_shard(file.url, folder, number))
            shards.append(InputFile(url, "parquet", file.source, *look(url)))
    return shards, bad


def save_codecs(coders: Mapping[str, Coder], folder: Path) -> None:
    """Write what decodes the codes into a folder for each role, whole or not at all."""
    for role, coder in coders.items():
        temporary = folder / f".{role}.tmp"
        if not (folder / role).exists():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            coder.save(temporary)
            os.replace(temporary, folder / role)


def _encode_file(file: InputFile, folder: Path, state: _State, coding: Coding, tick: Callable[[int], None]) -> None:
    shard: ParquetShard | None = None
    size = 0
    for batch in _batches(file, state, coding):
        rows = _rows(batch, coding)
        state = replace(state, samples=batch.stop, bad=[*state.bad, *batch.bad])
        size += batch.bytes
        del batch  # so that no other is held while the next one is read
        tick(size)
        for row in rows:
            shard = shard or ParquetShard(_shard(file.url, folder, state.shards), _schema(coding))
            shard.add(row)
        if shard and shard.bytes >= coding.shard_size:
            shard.close()
            shard, state = None, replace(state, shards=state.shards + 1)
            state.write(folder)
    if shard:
        shard.close()
        state = replace(state, shards=state.shards + 1)
    if look(file.url) != (file.size, file.version):
        raise UserError(f"{file.url} changed while it was being read; run the same command again")
    replace(state, done=True).write(folder)


@dataclass
class _Batch:
    """Samples that are encoded together: their values, with what the views made of media; `stop` is behind the last."""

    stop: int
    samples: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # where, and the values by role
    bad: list[str] = field(default_factory=list)
    bytes: int = 0  # of the samples as they are stored
    decoded: int = 0  # bytes of what the views made

    def refuse(self, why: str, on_bad: str) -> None:
        """Leave a sample out; raises `UserError` where that is not allowed."""
        if on_bad == "stop":
            raise UserError(f"{why}; mend the file, or leave such samples out with --on-bad skip")
        self.bad.append(why)


def _batches(file: InputFile, state: _State, coding: Coding) -> Iterator[_Batch]:
    """The samples behind those that are done; a batch ends at its last sample, and bad ones before that are its own."""
    batch = _Batch(state.samples)
    for sample in itertools.islice(scan_file(file, coding.columns), state.samples, None):
        where = f"{file.url}, document {batch.stop}"
        seen = _seen(sample.content, coding)
        batch.stop += 1
        if isinstance(seen, BadSample):
            batch.refuse(f"{where}: {seen.why}", coding.on_bad)
        else:
            batch.samples.append((where, seen))
            batch.bytes += sum(len(value) for value in sample.content.values())  # type: ignore[union-attr,misc]
            batch.decoded += sum(value.nbytes for value in seen.values() if isinstance(value, np.ndarray))
        if len(batch.samples) >= _BATCH_SAMPLES or batch.decoded >= _BATCH_BYTES or len(batch.bad) >= _BATCH_SAMPLES:
            yield batch
            batch = _Batch(batch.stop)
    yield batch


def _seen(content: Content, coding: Coding) -> dict[str, Any] | BadSample:
    """A sample's values by role, with what the coders' views make of media in their place; or why there are none."""
    if isinstance(content, BadSample):
        return content
    seen: dict[str, Any] = dict(content)
    for role, coder in coding.coders.items():
        raw = content[role]
        assert isinstance(raw, bytes)
        try:
            value = modality(role).decode(raw)
            seen[role] = coder.view.make(value, raw, np.random.default_rng(0))
            if not seen[role].size:
                raise ValueError("it is empty")
        except ValueError as error:
            return BadSample(f"the {role} cannot be encoded: {error}")
    return seen


def _rows(batch: _Batch, coding: Coding) -> list[Record]:
    """Rows of the shards; of what has no codes the batch is told."""
    kept = {role: name for role, name in coding.roles.items() if role not in coding.coders}
    rows: list[Record] = [{name: values[role] for role, name in kept.items()} for _, values in batch.samples]
    bad: set[int] = set()
    for role, coder in coding.coders.items():
        codes = coder.encode([values[role] for _, values in batch.samples]) if rows else []
        for number, (row, made) in enumerate(zip(rows, codes, strict=True)):
            try:
                row[CODES[role]] = pack(made)
            except ValueError as error:
                batch.refuse(f"{batch.samples[number][0]}: the {role} cannot be encoded: {error}", coding.on_bad)
                bad.add(number)
    return [row for number, row in enumerate(rows) if number not in bad]


def _schema(coding: Coding) -> pa.Schema:
    kinds: dict[str, pa.DataType] = {"text": pa.string()}
    return pa.schema((name, kinds.get(name, pa.binary())) for name in coding.roles.values())
