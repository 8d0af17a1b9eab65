"""Data sets of the `datasets` library, streamed into JSON lines below a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from millrace.core.errors import UserError, did_you_mean
from millrace.core.rundir import write_atomic
from millrace.data.inputs import DATASET, Progress


def import_dataset(name: str, number: int, column: str, raw: Path, shard_size: int, progress: Progress) -> str:
    """Stream the data set `datasets:NAME[:CONFIG[:SPLIT]]` into JSON lines below `raw`; return a glob.

    Shards appear whole; after an interruption the documents in them are skipped, not written again.

    Raises:
        UserError: the data set cannot be loaded, or has no such column.
    """
    raw.mkdir(parents=True, exist_ok=True)
    pattern = f"{number:03d}-*.jsonl"
    done = raw / f"{number:03d}.json"
    if not done.exists():
        shards = sorted(raw.glob(pattern))
        written = sum(_count_lines(shard) for shard in shards)
        rows = _open_dataset(name, column, written)
        parts = _cut(rows, shard_size)
        size = sum(shard.stat().st_size for shard in shards)
        for count, text in enumerate(parts, len(shards)):
            write_atomic(raw / f"{number:03d}-{count:05d}.jsonl", text)
            size += len(text.encode())
            progress(f"reading {name}", size, 0)
        write_atomic(done, json.dumps({"input": name}))
    return str(raw / pattern)


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _cut(rows: Iterator[dict[str, Any]], shard_size: int) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for row in rows:
        lines.append(json.dumps(row, ensure_ascii=True) + "\n")
        size += len(lines[-1])
        if size >= shard_size:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def _open_dataset(name: str, column: str, skip: int) -> Iterator[dict[str, Any]]:
    import datasets

    parts = name.removeprefix(DATASET).split(":")
    path, config, split = (parts + ["", ""])[:3]
    try:
        if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            loaded: Any = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, config or None, split=split or None, streaming=True)
        if isinstance(loaded, dict):
            loaded = loaded[split or "train"]
    except Exception as error:  # `datasets` raises many kinds; all of them mean that it cannot be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot load the data set '{name}': {reason}; check name, config and split") from None
    names = list(loaded.features or {})
    if names and column not in names:
        hint = did_you_mean(column, names) or f"; it has: {', '.join(names)}"
        raise UserError(f"the data set '{name}' has no column '{column}'{hint}; name the text column with `text`")
    return ({column: row.get(column)} for row in loaded.skip(skip))
