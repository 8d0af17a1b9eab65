"""Verdicts: why documents leave the corpus, one small Parquet file per step and unit; and the paths of the work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millrace.data.curate.config import STEPS
from millrace.data.index import write_parquet

_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("rule", pa.string()),
        ("value", pa.float64()),
        ("detail", pa.string()),
        ("kept", pa.string()),
    ]
)


@dataclass(frozen=True)
class Verdict:
    """Why document `number` of a unit leaves: the step's rule, what it measured, and words for people."""

    number: int
    rule: str
    value: float
    detail: str = ""
    kept: str = ""  # id of the document that stays in place of a duplicate


@dataclass(frozen=True)
class Job:
    """What a worker needs to know."""

    work: Path
    text: str
    steps: tuple[str, ...]  # those that are switched on
    remove_contaminated: bool
    samples: int
    on_bad: str

    def path(self, what: str, number: int, suffix: str = "") -> Path:
        """File of a unit (or band) in the folder of one kind of result."""
        return self.work / what / f"{number:05d}{suffix}"

    def save(self, step: str, unit: int, verdicts: Sequence[Verdict]) -> None:
        """Write a unit's verdicts of one step."""
        columns = {name: [getattr(verdict, name) for verdict in verdicts] for name in _SCHEMA.names}
        write_parquet(pa.table(columns, _SCHEMA), self.path(f"verdicts/{step}", unit, ".parquet"))

    def load(self, step: str, unit: int) -> list[Verdict]:
        """Read them; none where the step did not write any."""
        path = self.path(f"verdicts/{step}", unit, ".parquet")
        return [Verdict(**row) for row in pq.read_table(path).to_pylist()] if path.exists() else []

    def noted(self, run: int) -> np.ndarray:
        """What the first pass noted of a run of files, shape (documents, `units.WIDTH`), mapped."""
        return np.load(self.path("noted", run, ".npy"), mmap_mode="r")

    def make_folders(self) -> None:
        """Make all folders of results."""
        for name in ("noted", "judged", "lines", "signatures", "rows", "pairs", "bands", "stats", "out/text"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        for name in ("out/removed", "out/flagged", "verdicts/undecoded", *(f"verdicts/{step}" for step in STEPS)):
            (self.work / name).mkdir(parents=True, exist_ok=True)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array that appears whole."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb") as file:
        np.save(file, array)
        os.fsync(file.fileno())
    os.replace(temporary, path)
