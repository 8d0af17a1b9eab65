"""Rows of a data set of the `datasets` library, streamed from any of them on. Loaded lazily.

Nothing is decoded, and no code of a data set runs: the library has not run any since 4.0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from millrace.core.errors import UserError, did_you_mean
from millrace.data.dataset_builder import inside_of, is_prepared, load_builder, origin_of, told
from millrace.data.dataset_files import DatasetName, no_split, saved_folder
from millrace.data.dataset_values import Inside


class _File(datasets.Image):  # type: ignore[misc]
    """A file as {"bytes", "path"}, whatever is in it.

    `Audio.encode_example` asks for torchcodec even where there is nothing to encode, and `Image.encode_example` drops
    the bytes of a row where a file of that name happens to exist.
    """

    def encode_example(self, value: Any) -> Any:
        return {"path": value, "bytes": None} if isinstance(value, str) else value


class DatasetRows:
    """The wanted columns of one split, row by row.

    `identity` changes when the data do. `inside` opens the files that rows name.
    """

    def __init__(self, name: DatasetName, columns: Sequence[str]) -> None:
        """Open it; nothing is read yet but for what tells the columns.

        Raises:
            UserError: it cannot be had, or has no such split or column.
        """
        folder = saved_folder(name)
        with told(name):
            if folder:
                whole = _open_saved(name, folder)
                origin: list[Any] = ["saved", whole._fingerprint, len(whole)]
                rows, self.inside = whole.to_iterable_dataset(), Inside(folder)
            else:
                builder = load_builder(name)
                self.inside = inside_of(builder)
                rows, mode = _open_named(name, builder)
                origin = [mode, builder.hash, builder.config_id, origin_of(builder)]
            _check_columns(name, columns, list(rows.features or next(iter(rows), {})))
            rows = rows.decode(False) if rows.features else rows  # threads decode what the hub streams
            rows = rows.select_columns(list(columns))
            for column, feature in (rows.features or {}).items():
                if isinstance(feature, (datasets.Image, datasets.Audio)):
                    rows = rows.cast_column(column, _File(decode=False))
        self._name, self._rows = name, rows
        self.identity = hashlib.sha256(json.dumps([datasets.__version__, name.text, *origin]).encode()).hexdigest()

    def token_type(self, column: str) -> Any:
        """The integer type (of pyarrow) that a column of lists declares, if it does."""
        feature = (self._rows.features or {}).get(column)
        item = getattr(feature, "feature", None)
        return item.pa_type if isinstance(item, datasets.Value) and "int" in item.dtype else None

    def read(self, state: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """Rows behind those that had been read when `state` was taken.

        Raises:
            UserError: it cannot be read any further.
        """
        if state:
            self._rows.load_state_dict(state)
        with told(self._name, "read on in", "; run the same command again to continue"):
            iterator = iter(self._rows)
        while True:
            with told(self._name, "read on in", "; run the same command again to continue"):
                row = next(iterator, None)
            if row is None:
                return
            yield row

    def state(self) -> dict[str, Any]:
        """Where reading is, for `read`."""
        return dict(self._rows.state_dict())


def _open_saved(name: DatasetName, folder: Path) -> Any:
    loaded: Any = datasets.load_from_disk(str(folder))
    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    if name.whole:
        if name.split not in splits:
            raise no_split(name, list(splits))
        return splits[name.split]
    parts = datasets.ReadInstruction.from_spec(name.split).to_absolute({key: len(rows) for key, rows in splits.items()})
    return datasets.concatenate_datasets([splits[p.splitname].select(range(p.from_, p.to)) for p in parts])


def _open_named(name: DatasetName, builder: Any) -> tuple[Any, str]:
    """(rows, how they are read): out of the cache of `datasets` where it was prepared, or has to be; else streamed."""
    prepared = is_prepared(builder)
    if not name.whole and not prepared:
        # Of files that have changed since, the number of rows that there were says nothing.
        checks = "no_checks" if builder.repo_id is None else None
        builder.download_and_prepare(download_mode="reuse_cache_if_exists", verification_mode=checks)
    if not name.whole or prepared:
        if name.whole and name.split not in builder.info.splits:
            raise no_split(name, list(builder.info.splits))
        return builder.as_dataset(split=name.split).to_iterable_dataset(), "prepared"
    splits = builder.as_streaming_dataset()
    if name.split not in splits:
        raise no_split(name, list(splits))
    return splits[name.split], "streamed"


def _check_columns(name: DatasetName, wanted: Sequence[str], names: Sequence[str]) -> None:
    for column in wanted:
        if names and column not in names:
            hint = did_you_mean(column, names) or f"; it has: {', '.join(names)}"
            raise UserError(
                f"the data set '{name.text}' has no column '{column}'{hint}; name its columns with --text, --image, "
                "--audio or --tokens"
            )
