"""Units of work in the folder of a preparation: done one by one, kept in `.work/` until all of them are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from millrace.core.console import warn
from millrace.data.index import Entries, to_entries
from millrace.data.inputs import InputFile, Progress
from millrace.data.manifest import Shard
from millrace.data.units import UnitOptions, run_unit, unit_key


@dataclass(frozen=True)
class Work:
    """The units to do; `first` is the number of the first one, behind those of earlier calls that finished."""

    out: Path
    first: int
    units: Sequence[Sequence[InputFile]]
    options: UnitOptions

    def run(self, progress: Progress) -> int:
        """Finish all units; return how many an interrupted call had finished."""
        total = sum(file.size for unit in self.units for file in unit)
        before = reused = 0
        for number, unit in enumerate(self.units, self.first):
            size = sum(file.size for file in unit)
            record = self._record(number)
            if record.get("key") == unit_key(unit, self.options):
                reused += 1
            else:
                if record:
                    warn(f"inputs changed since the interruption: preparing {unit[0].url} again")
                seen = 0

                def tick(count: int, before: int = before, size: int = size) -> None:
                    nonlocal seen
                    seen += count
                    progress("preparing", before + min(seen, size), total)

                run_unit(number, unit, self.options, self.out, tick)
            before += size
            progress("preparing", before, total)
        return reused

    def records(self) -> list[dict[str, Any]]:
        """What each unit left: {"key", "skipped", "hashes", and the shards of each part}."""
        return [self._record(self.first + i) for i in range(len(self.units))]

    def shards(self, part: str, folder: Path) -> list[Shard]:
        """New shards of a part, whose manifest lies in `folder`; what lies below `out` is named relative to it."""
        shards = [Shard(**shard) for record in self.records() for shard in record[part]]
        inside = ["://" not in shard.url and Path(shard.url).is_relative_to(self.out) for shard in shards]
        return [replace(s, url=os.path.relpath(s.url, folder)) if i else s for s, i in zip(shards, inside, strict=True)]

    def entries(self, part: str) -> Iterator[Entries]:
        """Index entries of these shards, unit by unit."""
        for number in range(self.first, self.first + len(self.units)):
            yield to_entries(pq.read_table(self._path(f"{number:05d}.{part}.parquet")))

    def _path(self, name: str) -> Path:
        return self.out / ".work" / name

    def _record(self, number: int) -> dict[str, Any]:
        path = self._path(f"{number:05d}.json")
        return dict(json.loads(path.read_text())) if path.exists() else {}
