"""One process of one arm: `python -m peers.run TASK` (JSON) in the arm's environment; the result is a JSON file."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peers.job import Job, Missing

_ASKED = (
    "mosaicml-streaming", "litdata", "webdataset", "datasets", "torchdata", "millrace", "torch", "numpy", "pyarrow",
    "pillow", "soundfile", "tokenizers", "transformers", "boto3", "obstore", "s3fs", "fsspec",
)  # fmt: skip
# Of the samples of a task: rates are taken between, with the pipeline full at both ends. It stops early enough that a
# shuffle buffer which has nothing more to read is not inside (nor the five seconds that `datasets` 5.2 then sleeps).
WINDOW = (0.1, 0.7)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to do with the stream of a job."""

    job: dict[str, Any]
    result: str
    limit: int  # samples to take; more than an epoch takes what there is
    ids: str | None = None  # write the ids of every batch there as it is consumed
    marks: list[int] = field(default_factory=list)  # save the state when so many samples were consumed
    every: int | None = None  # or again and again after so many
    states: str | None = None  # folder of the states
    resume: str | None = None  # a state to continue from
    rates_only: bool = False  # stop as soon as they are known
    started: float = 0.0  # time.time() of the parent before it started this process


class _Meter:
    """Wall and CPU seconds of this process and its descendants, since construction."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), tree_cpu_seconds(os.getpid())

    def read(self) -> tuple[float, float]:
        """(wall, CPU)."""
        return time.perf_counter() - self._wall, tree_cpu_seconds(os.getpid()) - self._cpu


def descendants(pid: int) -> list[int]:
    """`pid` and all processes below it."""
    found = [pid]
    for parent in found:  # grows as it is walked
        try:
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (thread / "children").read_text().split()]
        except OSError:
            continue  # it has ended meanwhile
    return found


def tree_cpu_seconds(pid: int) -> float:
    """User and system time of a process, its living descendants, and those that were waited for; to 10 ms each.

    Linux scales both times to the scheduler's exact account, so that ticks are rounding and no sampling.
    """
    total = 0
    for process in descendants(pid):
        try:
            text = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            continue
        total += sum(int(value) for value in text.rpartition(")")[2].split()[11:15])  # utime, stime, cutime, cstime
    return total / os.sysconf("SC_CLK_TCK")


def save_state(stream: Any, consumed: int, path: Path) -> None:
    """As a checkpoint would: whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(pickle.dumps({"state": stream.state(), "consumed": consumed}))
    temporary.replace(path)


def consume(task: Task, stream: Any, state_folder: Path) -> dict[str, float]:
    """Take the batches; when the first came, and the rates inside the window."""
    log = os.open(task.ids, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if task.ids else None
    marks = list(task.marks)
    consumed, last_save, meter, at_start, found = 0, 0, None, 0, {}
    for batch in stream:
        if consumed == 0:
            found["first_batch"] = time.time()
        ids = np.asarray(batch["ids"], np.int64)
        consumed += len(ids)
        if log is not None:  # one write: a kill leaves whole batches
            os.write(log, np.concatenate([[len(ids)], ids]).astype("<i8").tobytes())
        if marks and consumed >= marks[0]:
            save_state(stream, consumed, state_folder / f"{marks.pop(0)}.pkl")
        if task.every and consumed - last_save >= task.every:
            last_save = consumed
            save_state(stream, consumed, state_folder / "last.pkl")
        if meter is None and consumed >= WINDOW[0] * task.limit:
            meter, at_start = _Meter(), consumed
        elif meter and "seconds" not in found and consumed >= WINDOW[1] * task.limit:
            found["seconds"], found["cpu_seconds"] = meter.read()
            found["window_samples"] = consumed - at_start
        if consumed >= task.limit or (task.rates_only and "seconds" in found):
            break
    return found | {"consumed": consumed}


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    job = Job(**task.job)
    state = None
    if task.resume:
        state = pickle.loads(Path(task.resume).read_bytes())["state"]  # this benchmark's own file
    try:
        import torch

        torch.set_num_threads(1)
        arm = importlib.import_module(f"peers.arms.{job.arm.partition('-')[0]}")
        opened = time.time()
        stream = arm.open_stream(job, state)
        found: dict[str, Any] = consume(task, stream, Path(task.states or "."))
        found["first_from_start"] = found["first_batch"] - task.started if "first_batch" in found else None
        found["first_from_open"] = found["first_batch"] - opened if "first_batch" in found else None
    except Missing as why:
        found = {"missing": str(why)}
    Path(task.result).write_text(json.dumps(found | {"versions": _versions()}))


def _versions() -> dict[str, str]:
    """Of every package of this environment that has a say in the result."""
    from importlib.metadata import distributions

    known = {d.metadata["Name"].lower(): d.version for d in distributions()}
    return {"python": sys.version.split()[0]} | {name: known[name] for name in _ASKED if name in known}


if __name__ == "__main__":
    main()
