"""Units of work: documents of one input that a worker takes at a time.

The first pass takes runs of files; then places and sizes of all documents are known, and the others take runs of
documents of about equal size, however large a file is.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from millrace.core.errors import UserError
from millrace.data.inputs import InputFile, look
from millrace.data.sources.base import BadSample, Content, Place
from millrace.data.stores.base import open_blob
from millrace.data.units import source_of

_MIN_BYTES = 4 * 2**20
_UNITS = 250  # at most about twice as many, besides those for many inputs: datatrove opens a file for each at once
_BATCH, _BATCH_BYTES = 64, 2**20  # documents that are read in one call, and their text unless it is one document

FILE, BYTES, HIGH, LOW, PLACE = range(5)
WIDTH = PLACE + 2
"""Columns of what the first pass notes of a document, uint64: number of its file, bytes of text, hash, place."""


@dataclass(frozen=True)
class Unit:
    """Documents `start` to `stop` of a run of files; the first pass numbers runs of files and knows no `stop`."""

    number: int
    source: int  # number of the input
    files: Sequence[InputFile]
    bytes: int  # of the files, or of the documents' text
    run: int = 0  # number of the run of files
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Document:
    """A document as it was read: `text`, or why it has none."""

    number: int  # in its unit
    id: str  # FILE#ORDINAL, from 0
    text: str
    bad: str = ""


def runs_of_files(files: Sequence[InputFile]) -> list[Unit]:
    """Cut the files. Depends on them alone, so that the result does not depend on the workers."""
    limit = max(_MIN_BYTES, sum(file.size for file in files) // _UNITS)
    parts: list[list[InputFile]] = []
    size = 0
    for file in files:
        if not parts or parts[-1][0].source != file.source or size + file.size > limit:
            parts.append([])
            size = 0
        parts[-1].append(file)
        size += file.size
    return [Unit(number, part[0].source, part, sum(file.size for file in part)) for number, part in enumerate(parts)]


def runs_of_documents(runs: Sequence[Unit], sizes: Sequence[np.ndarray]) -> list[Unit]:
    """Cut each run of files by its documents' `sizes` (bytes of text)."""
    limit = max(_MIN_BYTES, sum(int(size.sum()) for size in sizes) // _UNITS)
    units: list[Unit] = []
    for run, size in zip(runs, sizes, strict=True):
        share = np.maximum(np.cumsum(size) - 1, 0) // limit  # which of the equal shares a document ends in
        cuts = (np.flatnonzero(np.diff(share, append=-1)) + 1).tolist() if len(size) else []
        for start, stop in pairwise([0, *cuts]):
            amount = int(size[start:stop].sum())
            units.append(Unit(len(units), run.source, run.files, amount, run.number, start, stop))
    return units


def first_documents(rows: np.ndarray, unit: Unit) -> np.ndarray:
    """Where the documents of each of the files begin, in the rows of the run."""
    return np.searchsorted(rows[:, FILE], np.arange(len(unit.files), dtype=np.uint64))


def document_id(path: str | Path, ordinal: int) -> str:
    """FILE#ORDINAL."""
    return f"{path}#{ordinal}"


def scan(run: Unit, text: str) -> Iterator[tuple[int, Place, Document]]:
    """Stream the documents of a run of files, undecodable ones too: (number of the file, place, document).

    `text` names the column.

    Raises:
        UserError: a file that cannot be read, or that changed since the run was made.
    """
    number = 0
    for index, file in enumerate(run.files):
        try:
            with open_blob(file.url) as blob:
                for ordinal, sample in enumerate(source_of(file, {"text": text}).scan(blob)):
                    yield index, sample.place, _document(number, file, ordinal, sample.content)
                    number += 1
            _unchanged(file)
        except OSError as error:
            raise UserError(str(error)) from None


def read(unit: Unit, rows: np.ndarray, text: str, skip: Container[int] = ()) -> Iterator[Document]:
    """Stream the documents of a unit by their places, without those whose numbers are in `skip`.

    `rows` is what the first pass noted of the unit's run. Memory: a batch of documents; of Parquet what `ParquetSource`
    keeps.

    Raises:
        UserError: as `scan`.
    """
    firsts = first_documents(rows, unit)
    wanted = (at for at in range(unit.start, unit.stop) if at - unit.start not in skip)
    for index, members in groupby(wanted, key=lambda at: int(rows[at, FILE])):
        file, left = unit.files[index], list(members)
        source = source_of(file, {"text": text})
        try:
            with open_blob(file.url) as blob:
                for batch in _batches(left, rows):
                    places = [(int(rows[at, PLACE]), int(rows[at, PLACE + 1])) for at in batch]
                    for at, content in zip(batch, source.read(blob, places), strict=True):
                        yield _document(at - unit.start, file, at - int(firsts[index]), content)
            _unchanged(file)
        except OSError as error:
            raise UserError(str(error)) from None


def _batches(members: list[int], rows: np.ndarray) -> Iterator[list[int]]:
    batch: list[int] = []
    size = 0
    for at in members:
        if batch and (len(batch) >= _BATCH or size + int(rows[at, BYTES]) > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(at)
        size += int(rows[at, BYTES])
    yield batch


def _document(number: int, file: InputFile, ordinal: int, content: Content) -> Document:
    name = document_id(file.url, ordinal)
    if isinstance(content, BadSample):
        return Document(number, name, "", bad=content.why)
    return Document(number, name, str(content["text"]))


def _unchanged(file: InputFile) -> None:
    if look(file.url) != (file.size, file.version):
        raise UserError(f"{file.url} changed while it was being curated; delete the output folder and begin anew")
