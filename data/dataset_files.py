"""Data sets of the `datasets` library: their names, and the files on this machine that hold them already."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from millrace.core.errors import UserError, did_you_mean

DATASET = "datasets:"


@dataclass(frozen=True)
class DatasetName:
    """`datasets:PATH[:CONFIG[:SPLIT]]`; PATH is OWNER/NAME on the hub, a folder, a file or a glob."""

    text: str
    path: str
    config: str
    split: str

    @classmethod
    def parse(cls, text: str) -> DatasetName:
        """Take a name apart. SPLIT may be an expression such as train[:10%]; it defaults to "train".

        Raises:
            UserError: it names nothing.
        """
        path, config, split = (text.removeprefix(DATASET).split(":", 2) + ["", ""])[:3]
        if not path:
            raise UserError(f"'{text}' names no data set; write {DATASET}NAME[:CONFIG[:SPLIT]]")
        return cls(text, path, config, split or "train")

    @property
    def whole(self) -> bool:
        """Whether a split is named, rather than an expression of splits."""
        return not any(mark in self.split for mark in "[+")


def saved_folder(name: DatasetName) -> Path | None:
    """The folder that `save_to_disk` wrote, if the data set is one."""
    folder = Path(name.path).expanduser()
    marks = (folder / "dataset_dict.json", folder / "state.json")
    return folder if any(mark.is_file() for mark in marks) else None


def no_split(name: DatasetName, splits: list[str]) -> UserError:
    """The error that a data set has other splits."""
    hint = did_you_mean(name.split, splits) or f"; it has: {', '.join(splits)}"
    return UserError(f"the data set '{name.text}' has no split '{name.split}'{hint}")


def dataset_files(text: str, copy: Path) -> list[Path] | None:
    """Files that hold exactly the rows of the data set `text`, in order.

    They are the Parquet files of a finished import into `copy` (see importing.py), or the Arrow files of a folder of
    `save_to_disk` or of a data set that `load_dataset` has prepared on this machine. None where it has to be imported:
    an import has begun, or there are no such files, or SPLIT is an expression, or rows were selected by an indices
    mapping (of early releases), or images or sounds lie outside of the Arrow files.

    Raises:
        UserError: it cannot be found, the folder is damaged, or there is no such split.
    """
    state = copy / "state.json"
    if state.is_file():
        record = read_json(state)
        return [copy / shard_name(i) for i in range(record["shards"])] if record["done"] else None
    name = DatasetName.parse(text)
    folder = saved_folder(name)
    if folder is None:
        from millrace.data.dataset_builder import prepared_files

        files = prepared_files(name)
    else:
        files = _saved_files(name, folder)
    return None if files is None or any(map(_names_files, files)) else files


def shard_name(number: int) -> str:
    """File of an import."""
    return f"{number:05d}.parquet"


def _saved_files(name: DatasetName, folder: Path) -> list[Path] | None:
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json").get("splits", [])
        if not name.whole:
            return None
        if name.split not in splits:
            raise no_split(name, splits)
        folder /= name.split
    state = read_json(folder / "state.json")
    only = state.get("_split") or "train"
    if not name.whole or state.get("_indices_data_files"):  # releases before 2.0 kept the mapping beside the rows
        return None
    if name.split not in (only, folder.name):
        raise no_split(name, [only])
    names = [entry["filename"] for entry in state.get("_data_files", []) if isinstance(entry.get("filename"), str)]
    files = [folder / file for file in names]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise UserError(f"{folder / 'state.json'} names {file}, which is not a file of that folder")
    return files


def _names_files(path: Path) -> bool:
    """Whether a row only names the file of its image or sound. Reads the heads and null bitmaps of the batches."""
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
            wanted = [i for i, field in enumerate(batches.schema) if _is_file(field.type)]
            return bool(wanted) and any(_path_alone(batch.column(i)) for batch in batches for i in wanted)
    except (pa.ArrowException, OSError):
        return False  # it will be named when it is read


def _is_file(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}


def _path_alone(column: pa.StructArray) -> bool:
    alone = pc.and_(column.field("bytes").is_null(), column.field("path").is_valid())
    return bool(pc.any(alone).as_py())


def read_json(path: Path) -> dict[str, Any]:
    """A record of `datasets` or of an import.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a readable part of a saved data set: {error}") from None
