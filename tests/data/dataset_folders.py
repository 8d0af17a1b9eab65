"""Data sets in the forms that `datasets` loads, and their preparation."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from millrace.data.prepare import PrepareConfig, Summary, prepare

COUNT = 30


def run(out: Path, *names: object, progress: Callable[[str, int, int], None] | None = None, **options: Any) -> Summary:
    values = {"count_tokens": False} | options
    config = PrepareConfig(inputs=[f"datasets:{name}" for name in names], out=str(out), **values)
    return prepare(config, progress) if progress else prepare(config)


def write_parquet(folder: Path, rows: list[dict[str, Any]], shards: int = 3) -> None:
    """A folder as `push_to_hub` writes it: features are in the schema."""
    file = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    types = {"text": pa.string(), "image": file, "audio": file, "tokens": pa.list_(pa.uint16())}
    features = datasets.Features(
        text=datasets.Value("string"),
        image=datasets.Image(),
        audio=datasets.Audio(),
        tokens=datasets.List(datasets.Value("uint16")),
    )
    named = [
        row | {"image": {"bytes": row["image"], "path": f"{i}.png"}, "audio": {"bytes": row["audio"], "path": None}}
        for i, row in enumerate(rows)
    ]
    table = pa.Table.from_pylist(named, pa.schema(types.items(), features.arrow_schema.metadata))
    folder.mkdir(parents=True)
    for shard in range(shards):
        part = table.slice(shard * len(rows) // shards, len(rows) // shards)
        pq.write_table(part, folder / f"train-{shard:05d}-of-{shards:05d}.parquet", row_group_size=4)


def write_jsonl(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": row["text"], "tokens": row["tokens"]}) + "\n" for row in rows]
    (folder / "0.jsonl").write_text("".join(lines[:11]))
    (folder / "1.jsonl").write_text("".join(lines[11:]))


def write_csv(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    quoted = [row["text"].replace('"', '""') for row in rows]
    (folder / "a.csv").write_text("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(quoted)))


def write_folder(folder: Path, rows: list[dict[str, Any]], role: str) -> None:
    folder.mkdir(parents=True)
    names = [f"{i:02d}.{'png' if role == 'image' else 'wav'}" for i in range(len(rows))]
    for name, row in zip(names, rows, strict=True):
        (folder / name).write_bytes(row[role])
    lines = [json.dumps({"file_name": n, "text": r["text"]}) + "\n" for n, r in zip(names, rows, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(lines))


def write_tar(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, row in enumerate(rows):
            for suffix, raw in (("txt", row["text"].encode()), ("png", row["image"]), ("wav", row["audio"])):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))


def save_paths(folder: Path, paths: list[str]) -> None:
    """A data set that was saved with paths alone, as early releases did."""
    datasets.Dataset.from_dict({"n": [0]}).save_to_disk(folder)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = datasets.Features(image=datasets.Image())
    schema = pa.schema([("image", kind)], features.arrow_schema.metadata)
    (file,) = folder.glob("*.arrow")
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write(pa.record_batch([pa.array([{"bytes": None, "path": p} for p in paths], kind)], schema=schema))
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"features": features.to_dict()}))


WRITE: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "parquet": write_parquet,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "images": lambda folder, rows: write_folder(folder, rows, "image"),
    "sounds": lambda folder, rows: write_folder(folder, rows, "audio"),
    "tar": write_tar,
}
