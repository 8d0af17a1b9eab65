"""What `prepare` reads: files, folders, globs and data sets, resolved to a sorted list of files."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.core.errors import UserError, did_you_mean
from millrace.core.rundir import write_atomic

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
DATASET = "datasets:"

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all or 0 where unknown)."""


@dataclass(frozen=True)
class InputFile:
    """A file to prepare; `source` numbers the input that named it."""

    path: Path
    kind: str
    source: int
    size: int
    mtime_ns: int

    def key(self) -> list[Any]:
        """What must not change while a folder is being prepared."""
        return [str(self.path), self.kind, self.source, self.size, self.mtime_ns]


def resolve(inputs: Sequence[str], kind: str, out: Path) -> list[InputFile]:
    """Files of all inputs, each input's sorted by path.

    Raises:
        UserError: nothing there, nothing readable there, or a file that two inputs name.
    """
    files: list[InputFile] = []
    seen: dict[Path, str] = {}
    for source, name in enumerate(inputs):
        for path in _paths(name, kind, out):
            if path in seen:
                raise UserError(f"{path} is named twice, by '{seen[path]}' and '{name}'; name it once")
            seen[path] = name
            status = path.stat()
            found = kind if kind != "auto" else KINDS.get(path.suffix.lower(), "text")
            files.append(InputFile(path, found, source, status.st_size, status.st_mtime_ns))
    return files


def _paths(name: str, kind: str, out: Path) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _walk(path, kind, out)
    if path.is_file():
        return [path.resolve()]
    matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    found = [p.resolve() for p in matches if p.is_file()]
    if not found:
        names = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(name, names) or f"; a data set of the hub is written {DATASET}NAME:CONFIG:SPLIT"
        raise UserError(f"no input '{name}': no file, folder or match of that name{hint}")
    return found


def _walk(folder: Path, kind: str, out: Path) -> list[Path]:
    wanted = (*KINDS, *TEXT_SUFFIXES)
    found, others = [], set()
    for root, folders, names in os.walk(folder.resolve()):
        folders[:] = [
            f for f in folders if not f.startswith((".", "__pycache__")) and (Path(root) / f).resolve() != out.resolve()
        ]
        for name in names:
            path = Path(root) / name
            if name.startswith("."):
                continue
            if kind != "auto" or path.suffix.lower() in wanted:
                found.append(path)
            else:
                others.add(path.suffix or name)
    if not found:
        has = f" (it has: {', '.join(sorted(others)[:8])})" if others else " (it is empty)"
        raise UserError(
            f"the folder {folder} holds no {', '.join(wanted)} file{has}; name files with a glob to read them as text"
        )
    return sorted(found)


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
