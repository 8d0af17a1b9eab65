"""The steps in order: passes over all units in the workers, and what needs all documents at once between them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from millrace.core.errors import UserError
from millrace.core.rundir import write_atomic
from millrace.core.units import fmt_size
from millrace.data.curate import contamination, exact, near
from millrace.data.curate.config import CurateConfig
from millrace.data.curate.passes import find_pairs, judge_unit, note_run
from millrace.data.curate.pool import Pool
from millrace.data.curate.units import (
    BYTES,
    HIGH,
    LOW,
    Unit,
    document_id,
    first_documents,
    runs_of_documents,
    runs_of_files,
)
from millrace.data.curate.verdicts import Job, Verdict
from millrace.data.curate.write import write_unit
from millrace.data.inputs import InputFile, Progress

_SHRUNK = 0.5  # of the text's size, what zstd leaves of it at most


class _Numbers:
    """Names of documents: of the `position`-th of all, or by unit and number in it. Memory: 8 bytes per file."""

    def __init__(self, units: Sequence[Unit], job: Job) -> None:
        self._units = units
        self._starts = {unit.run: first_documents(job.noted(unit.run), unit) for unit in units}
        self._offsets = np.cumsum([0, *(unit.stop - unit.start for unit in units)])

    def id(self, unit: int, number: int) -> str:
        """FILE#ORDINAL."""
        starts, at = self._starts[self._units[unit].run], self._units[unit].start + number
        file = int(np.searchsorted(starts, at, "right")) - 1
        return document_id(self._units[unit].files[file].url, at - int(starts[file]))

    def split(self, position: int) -> tuple[int, int]:
        """(unit, number in it)."""
        unit = int(np.searchsorted(self._offsets, position, "right")) - 1
        return unit, position - int(self._offsets[unit])


def run_steps(
    config: CurateConfig, files: Sequence[InputFile], evaluation: Sequence[InputFile], work: Path, progress: Progress
) -> None:
    """Do what is left to do below `work`; the result is in `work/out` and `work/stats`.

    Raises:
        UserError: see `curate`.
    """
    steps = tuple(step for step in ("exact", "quality", "near") if getattr(config, step))
    job = Job(
        work=work,
        text=config.text,
        steps=(*steps, "contamination") if evaluation else steps,
        remove_contaminated=config.contaminated == "remove",
        samples=config.samples,
        on_bad=config.on_bad,
    )
    job.make_folders()
    if evaluation:
        contamination.save(contamination.read_evaluation(evaluation), work / "evaluation")
    runs = runs_of_files(files)
    with Pool(config.processes()) as pool:
        _each(pool, runs, job, (note_run, "noted/{:05d}.npy", "reading"), progress)
        sizes = [job.noted(run.number)[:, BYTES].astype(np.int64) for run in runs]
        _check(config, job, sum(map(len, sizes)), sum(int(size.sum()) for size in sizes))
        units = runs_of_documents(runs, sizes)
        del sizes
        numbers = _Numbers(units, job)
        _undecoded(runs, job, numbers)
        if config.exact:
            _once(work / "exact.json", lambda: _exact(runs, job, numbers))
        _each(pool, units, job, (judge_unit, "judged/{:05d}.npy", "judging"), progress)
        if config.near:
            _bands(pool, job, progress)
            _once(work / "near.json", lambda: _near(units, job, numbers))
        _each(pool, units, job, (write_unit, "stats/{:05d}.json", "writing"), progress)


def _each(
    pool: Pool, units: Sequence[Unit], job: Job, what: tuple[Callable[..., None], str, str], progress: Progress
) -> None:
    """Call a pass on every unit whose last file is not there yet."""
    function, mark, name = what
    total = sum(unit.bytes for unit in units)
    left = [unit for unit in units if not (job.work / mark.format(unit.number)).exists()]
    done = total - sum(unit.bytes for unit in left)
    for number, _ in pool.each(function, [(unit, job) for unit in left]):
        done += left[number].bytes
        progress(name, done, total)


def _once(mark: Path, step: Callable[[], dict[str, Any]]) -> None:
    """Do what needs all documents at once, unless it was done; its figures for the report are in `mark`."""
    if not mark.exists():
        write_atomic(mark, json.dumps(step()))


def _check(config: CurateConfig, job: Job, count: int, size: int) -> None:
    """Whether there are documents, and room for what comes."""
    if not count:
        raise UserError(f"the corpus is empty ({', '.join(config.inputs)}): it has no documents")
    if not any((job.work / "judged").iterdir()):
        needed = int(_SHRUNK * size) + (near.DISK_BYTES * count if config.near else 0)
        free = shutil.disk_usage(job.work).free
        if free < needed:
            raise UserError(
                f"{job.work.parent} has {fmt_size(free)} free, and curation needs about {fmt_size(needed)}; free space "
                "there and run the same command again, or name a folder on another disk"
            )


def _positions(runs: Sequence[Unit], job: Job) -> tuple[list[tuple[int, Verdict]], int]:
    """(the undecodable documents by their position among all, the number of documents)."""
    bad, offset = [], 0
    for run in runs:
        bad += [(offset + verdict.number, verdict) for verdict in job.load("undecoded", run.number)]
        offset += len(job.noted(run.number))
    return bad, offset


def _undecoded(runs: Sequence[Unit], job: Job, numbers: _Numbers) -> None:
    """File what the first pass could not decode under the units."""
    bad = [(*numbers.split(position), verdict) for position, verdict in _positions(runs, job)[0]]
    for unit, found in groupby(bad, key=lambda item: item[0]):
        job.save("unreadable", unit, [replace(verdict, number=number) for _, number, verdict in found])


def _exact(runs: Sequence[Unit], job: Job, numbers: _Numbers) -> dict[str, Any]:
    high, low = (np.concatenate([job.noted(run.number)[:, column].copy() for run in runs]) for column in (HIGH, LOW))
    bad, count = _positions(runs, job)
    good = np.delete(np.arange(count), [position for position, _ in bad])
    duplicates, kept = (good[found] for found in exact.find_duplicates(high[good], low[good]))
    pairs = ((*numbers.split(one), *numbers.split(other)) for one, other in zip(duplicates, kept, strict=True))
    for unit, found in groupby(pairs, key=lambda pair: pair[0]):
        same = [Verdict(number, "duplicate", 1.0, "", numbers.id(*first)) for _, number, *first in found]
        job.save("exact", unit, same)
    return _sizes(kept)


def _bands(pool: Pool, job: Job, progress: Progress) -> None:
    left = [band for band in range(near.BANDS) if not job.path("bands", band, ".npy").exists()]
    for count, _ in enumerate(pool.each(find_pairs, [(band, job) for band in left]), near.BANDS - len(left) + 1):
        progress("finding near duplicates", count, near.BANDS)


def _near(units: Sequence[Unit], job: Job, numbers: _Numbers) -> dict[str, Any]:
    links = np.concatenate([np.load(job.path("bands", band, ".npy")) for band in range(near.BANDS)])
    packed = np.unique(links[:, ::2] << 32 | links[:, 1::2], axis=0)  # rows of (document, document)
    duplicates, kept = near.clusters(packed)
    pairs = ((divmod(int(one), 2**32), divmod(int(other), 2**32)) for one, other in zip(duplicates, kept, strict=True))
    rows = near.Rows(job.work / "rows")
    judged = lru_cache(128)(lambda unit: np.load(job.path("judged", unit, ".npy")))  # numbers of what has a signature

    def verdict(document: tuple[int, int], first: tuple[int, int]) -> Verdict:
        (unit, at), (other, kept) = document, first
        equal = near.agreement(rows.signature(unit, at), rows.signature(other, kept))
        detail = f"{equal} of {near.HASHES} hashes agree"
        name = numbers.id(other, int(judged(other)[kept]))
        return Verdict(int(judged(unit)[at]), "minhash", equal / near.HASHES, detail, name)

    for unit, found in groupby(pairs, key=lambda pair: pair[0][0]):
        job.save("near", unit, [verdict(*pair) for pair in found])
    return _sizes(kept)


def _sizes(kept: np.ndarray) -> dict[str, Any]:
    """How many clusters of duplicates, and how many documents the largest has."""
    _, counts = np.unique(kept, return_counts=True)
    return {"clusters": len(counts), "largest": int(counts.max()) + 1 if len(counts) else 0}
