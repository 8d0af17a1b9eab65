"""Import of data sets of the `datasets` library: streamed, row by row, into Parquet shards of the wanted columns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from millrace.core.console import warn
from millrace.core.errors import UserError
from millrace.core.rundir import write_atomic
from millrace.data import MODALITIES
from millrace.data.dataset_files import DatasetName, read_json, shard_name
from millrace.data.dataset_values import Inside, value_of
from millrace.data.parquet_shard import ParquetShard
from millrace.data.sources.base import BadSample, Value

if TYPE_CHECKING:
    from millrace.data.dataset_rows import DatasetRows

_TOLD = 8  # bad rows that are named


@dataclass(frozen=True, kw_only=True)
class Import:
    """What is taken of a data set, and how."""

    columns: Mapping[str, str]  # role -> column
    shard_size: int  # bytes of values
    on_bad: str  # "stop" or "skip"
    progress: Callable[[str, int, int], None]


@dataclass(frozen=True)
class _State:
    """What is done: `state.json` of the folder. `at` is where the stream stands behind the last shard."""

    input: str
    identity: str
    shards: int = 0
    rows: int = 0
    bytes: int = 0
    bad: int = 0
    at: dict[str, Any] | None = None
    done: bool = False

    def write(self, folder: Path) -> None:
        write_atomic(folder / "state.json", json.dumps(asdict(self)))


def import_dataset(text: str, folder: Path, options: Import) -> None:
    """Stream the data set `text` into Parquet shards in `folder`, which `dataset_files` then finds.

    A shard appears whole, and what is done is written behind it; an interrupted call is continued behind the last
    shard, or anew if the data set has changed. A row that cannot be read stops the import, or becomes a row of nulls,
    which are left out later. Memory: one row group.

    Raises:
        UserError: the data set cannot be had, has no such column, or has a row that cannot be read.
    """
    from millrace.data.dataset_rows import DatasetRows

    rows = DatasetRows(DatasetName.parse(text), list(options.columns.values()))
    folder.mkdir(parents=True, exist_ok=True)
    state = _begin(text, folder, rows.identity)
    shard: ParquetShard | None = None
    for row in rows.read(state.at):
        shard = shard or ParquetShard(folder / shard_name(state.shards), _schema(options, rows))
        record, why = _record(row, options.columns, rows.inside)
        if why:
            _bad(f"'{text}', row {state.rows}: {why}", state.bad, options.on_bad)
        shard.add(record)
        state = replace(state, rows=state.rows + 1, bad=state.bad + bool(why))
        if shard.bytes >= options.shard_size:
            state = _close(shard, replace(state, at=rows.state()), folder)
            shard = None
            options.progress(f"reading {text}", state.bytes, 0)
    if shard:
        state = _close(shard, state, folder)
    replace(state, done=True).write(folder)


def _begin(text: str, folder: Path, identity: str) -> _State:
    """What an interrupted call left, unless the data set has changed since."""
    if (folder / "state.json").exists():
        state = _State(**read_json(folder / "state.json"))
        if state.identity == identity:
            return state
        warn(f"the data set '{text}' changed since the interruption: importing it again")
        shutil.rmtree(folder)
        folder.mkdir()
    state = _State(text, identity)
    state.write(folder)
    return state


def _close(shard: ParquetShard, state: _State, folder: Path) -> _State:
    shard.close()
    state = replace(state, shards=state.shards + 1, bytes=state.bytes + shard.bytes)
    state.write(folder)
    return state


def _schema(options: Import, rows: DatasetRows) -> pa.Schema:
    types = {"text": pa.string(), **dict.fromkeys(MODALITIES, pa.binary())}
    return pa.schema(
        (column, types.get(role) or pa.list_(rows.token_type(column) or pa.int64()))
        for role, column in options.columns.items()
    )


def _record(row: Mapping[str, Any], columns: Mapping[str, str], inside: Inside) -> tuple[dict[str, Value | None], str]:
    """Values by column, and why they cannot be read, if so; then they are null."""
    record: dict[str, Value | None] = {}
    for role, column in columns.items():
        value = value_of(role, row.get(column), inside)
        if isinstance(value, BadSample):
            return dict.fromkeys(columns.values()), value.why
        record[column] = value
    return record, ""


def _bad(what: str, before: int, on_bad: str) -> None:
    if on_bad == "stop":
        raise UserError(f"{what}; mend the data set, or leave such rows out with --on-bad skip")
    if before < _TOLD:
        warn(f"{what}; it is left out{' (no more of them are named)' if before == _TOLD - 1 else ''}")
