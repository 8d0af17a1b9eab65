"""Reading examples: JSONL and Parquet files, folders and globs of them, and data sets of the `datasets` library."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from millrace.core.errors import UserError, did_you_mean

_SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, slots=True)
class Record:
    """The fields of one example, and where it stands: FILE:LINE, or FILE row N."""

    fields: Mapping[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded example.

    `input_ids` int32 (n,). `labels` int64, -100 for none: (n,) aligned with the inputs where each token may be a
    target, (1,) where the whole example has one. `bytes` of text that the targets stand for.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    bytes: int
    where: str


def read_records(name: str, columns: Mapping[str, str]) -> Iterator[Record]:
    """Stream the records of `name`: a file, a folder, a glob, or `NAME[:SPLIT]` of `datasets` (split "train").

    `columns` maps our field names to the data's; fields are given under our names.

    Raises:
        UserError: nothing there, or a line that is not a JSON object, by FILE:LINE.
    """
    ours = {theirs: name for name, theirs in columns.items()}
    for fields, where in _raw(name):
        yield Record({ours.get(key, key): value for key, value in fields.items()}, where)


def field(record: Record, name: str, columns: Mapping[str, str]) -> Any:
    """A field of a record.

    Raises:
        UserError: it is missing, with what is there instead.
    """
    if name in record.fields:
        return record.fields[name]
    named = columns.get(name, name)
    raise UserError(
        f"{record.where} has no field '{named}' (it has: {', '.join(record.fields) or 'nothing'})"
        f"{did_you_mean(named, record.fields)}; add it, or name yours: data.columns.{name}=NAME"
    )


def text_field(record: Record, name: str, columns: Mapping[str, str]) -> str:
    """A field that must be a string."""
    value = field(record, name, columns)
    if not isinstance(value, str):
        raise UserError(f"{record.where}: '{columns.get(name, name)}' is {value!r}, not a text; put it in quotes")
    return value


def _raw(name: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    path = Path(name)
    if path.is_dir() and (path / "dataset_info.json").is_file():
        return _from_datasets(name, saved=True)
    if path.is_dir():
        files = sorted(str(p) for p in path.iterdir() if p.suffix in _SUFFIXES)
        if not files:
            raise UserError(f"the folder {name} holds no .jsonl or .parquet file; name a folder that does")
        return _from_files(files)
    if path.is_file():
        return _from_files([name])
    if files := sorted(glob.glob(name)):
        return _from_files(files)
    if path.suffix in _SUFFIXES or any(c in name for c in "*?[") or name.startswith((".", "/", "~")):
        raise UserError(
            f"no examples at {name}: no such file; data.train and data.heldout name files, folders or globs"
        )
    return _from_datasets(name, saved=False)


def _from_files(files: list[str]) -> Iterator[tuple[Mapping[str, Any], str]]:
    for file in files:
        if Path(file).suffix == ".parquet":
            yield from _parquet(file)
        elif Path(file).suffix == ".jsonl":
            yield from _jsonl(file)
        else:
            raise UserError(f"{file} is neither .jsonl nor .parquet; convert it to one of these")


def _jsonl(file: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    with open(file, "rb") as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            where = f"{file}:{number}"
            try:
                fields = json.loads(raw)
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 ({error.reason}); re-encode the file") from None
            except ValueError as error:
                raise UserError(f"{where} is not JSON ({error}); mend or delete the line") from None
            if not isinstance(fields, dict):
                raise UserError(f'{where} is a {type(fields).__name__}, not an object; write {{"field": …}}')
            yield fields, where


def _parquet(file: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            row = 0
            for batch in opened.iter_batches(1024):
                for fields in batch.to_pylist():
                    yield fields, f"{file} row {row}"
                    row += 1
    except pa.ArrowInvalid as error:
        raise UserError(f"{file} is not a readable Parquet file ({error}); write it again") from None


def _from_datasets(name: str, *, saved: bool) -> Iterator[tuple[Mapping[str, Any], str]]:
    import datasets

    repository, _, split = name.partition(":")
    try:
        if saved:
            found: Any = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # many kinds: offline, gated, unknown, no such split
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"no examples '{name}': no such file, and `datasets` cannot give it ({reason}); "
            "name a file, a folder, a glob, or NAME[:SPLIT]"
        ) from None
    classes = {key: kind for key, kind in found.features.items() if isinstance(kind, datasets.ClassLabel)}
    for row, fields in enumerate(found):
        for key, kind in classes.items():
            fields[key] = kind.int2str(fields[key])
        yield fields, f"{name} row {row}"
