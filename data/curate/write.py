"""The last pass: kept documents into shards, a record for each of the others, counts and samples."""

from __future__ import annotations

import heapq
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from millrace.core.rundir import write_atomic
from millrace.data.curate.config import STEPS
from millrace.data.curate.units import Document, Unit, read
from millrace.data.curate.verdicts import Job, Verdict

_GROUP_BYTES, _GROUP_ROWS = 4 * 2**20, 4096  # of text in a row group: a window of samples is read from a few of them
_SAMPLE_LETTERS = 1200
KEPT = pa.schema([("text", pa.large_string()), ("id", pa.string())])
# Without the text: a folder of these can never be taken for data.
REMOVED = pa.schema(
    [
        ("id", pa.string()),
        ("bytes", pa.int64()),
        ("step", pa.string()),
        ("rule", pa.string()),
        ("value", pa.float64()),
        ("detail", pa.string()),
        ("kept", pa.string()),
    ]
)


def write_unit(unit: Unit, job: Job) -> None:
    """Write a unit's shard, its records and, last, its counts: `stats/NNNNN.json`."""
    name = f"{unit.source:03d}-{unit.number:05d}.parquet"
    verdicts = _first_verdicts(unit, job)
    kept, removed, flagged = (
        _Writer(job.work / "out" / folder / name, schema)
        for folder, schema in (("text", KEPT), ("removed", REMOVED), ("flagged", REMOVED))
    )
    counts = Counts(job.samples)
    for document in read(unit, job.noted(unit.run), job.text):
        size = len(document.text.encode())
        step, verdict = verdicts.get(document.number, ("", None))
        stays = verdict is None or (step == "contamination" and not job.remove_contaminated)
        counts.add(document, size, step, verdict, stays)
        if verdict is not None:
            (flagged if stays else removed).add(_record(document, size, step, verdict), size=256)
        if stays:
            kept.add({"text": document.text, "id": document.id}, size)
    for writer in (kept, removed, flagged):
        writer.close()
    write_atomic(job.path("stats", unit.number, ".json"), json.dumps(counts.result(unit.source)))


def _first_verdicts(unit: Unit, job: Job) -> Mapping[int, tuple[str, Verdict]]:
    """For each document with a verdict the first step's, and which step that is."""
    found: dict[int, tuple[str, Verdict]] = {}
    for step in STEPS:
        for verdict in job.load(step, unit.number):
            found.setdefault(verdict.number, (step, verdict))
    return found


def _record(document: Document, size: int, step: str, verdict: Verdict) -> dict[str, Any]:
    return {
        "id": document.id,
        "bytes": size,
        "step": step,
        "rule": verdict.rule,
        "value": verdict.value,
        "detail": verdict.detail,
        "kept": verdict.kept,
    }


class _Writer:
    """A Parquet file, row group by row group; none where nothing is added."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[dict[str, Any]] = []
        self._size = 0

    def add(self, row: dict[str, Any], size: int) -> None:
        self._rows.append(row)
        self._size += size
        if self._size >= _GROUP_BYTES or len(self._rows) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._temporary, self._schema, compression="zstd")
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._size = [], 0

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()
            with open(self._temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._temporary, self._path)


class Counts:
    """Documents and bytes of a unit by what became of them, and samples: those whose ids have the smallest hashes."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._totals = {"in": [0, 0], "kept": [0, 0]}
        self._rules: dict[tuple[str, str, bool], list[int]] = defaultdict(lambda: [0, 0])
        self._shown: dict[tuple[str, str, bool], list[tuple[int, dict[str, Any]]]] = defaultdict(list)

    def add(self, document: Document, size: int, step: str, verdict: Verdict | None, stays: bool) -> None:
        """Count one document."""
        _count(self._totals["in"], size)
        if stays:
            _count(self._totals["kept"], size)
        if verdict is not None:
            key = (step, verdict.rule, stays)
            _count(self._rules[key], size)
            if self._samples:
                self._sample(key, _record(document, size, step, verdict), document.text)

    def _sample(self, key: tuple[str, str, bool], record: dict[str, Any], text: str) -> None:
        order, shown = xxhash.xxh3_64_intdigest(record["id"].encode()), self._shown[key]
        if len(shown) < self._samples or order < -shown[0][0]:
            # A heap of negative numbers has the largest hash on top. No two ids of a unit have one hash.
            heapq.heappush(shown, (-order, record | {"text": text[:_SAMPLE_LETTERS], "letters": len(text)}))
            if len(shown) > self._samples:
                heapq.heappop(shown)

    def result(self, source: int) -> dict[str, Any]:
        """All of it, in a definite order."""
        return {
            "source": source,
            **self._totals,
            "rules": [[*key, *counts] for key, counts in sorted(self._rules.items())],
            "samples": [
                [*key, -order, sample] for key, shown in sorted(self._shown.items()) for order, sample in sorted(shown)
            ],
        }


def _count(total: list[int], size: int) -> None:
    total[0] += 1
    total[1] += size
