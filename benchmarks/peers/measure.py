"""The parent's side: start a task in its environment, sample its memory, kill it, and judge what it delivered."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peers import metrics
from peers.job import Job
from peers.payloads import SHARDS, labels
from peers.run import Task, descendants

BENCHMARKS = Path(__file__).resolve().parent.parent
POSITIONS = (0.1, 0.5, 0.9)
_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Arm:
    """A job and the interpreter of its environment."""

    job: Job
    python: str


class Child:
    """A task in a new process, the leader of its own group and session."""

    def __init__(self, arm: Arm, task: Task) -> None:
        cache = Path(arm.job.cache)
        cache.mkdir(parents=True, exist_ok=True)
        self._log = cache / "log.txt"
        self._result = Path(task.result)
        self._result.unlink(missing_ok=True)
        # Whatever a library leaves in its home or temporary folder goes with the job's cache.
        env = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "LC_ALL")} | {
            "HOME": str(cache), "TMPDIR": str(cache), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(BENCHMARKS)] + ([os.environ.get("PYTHONPATH", "")] if arm.python == sys.executable else [])
            ),
        }  # fmt: skip
        command = [arm.python, "-m", "peers.run", json.dumps(asdict(task) | {"started": time.time()})]
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                command, env=env, cwd=cache, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def result(self) -> dict[str, Any]:
        """Wait; what the task wrote, or {"error": its last lines}."""
        try:
            code = self.process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {"error": f"no end within {_TIMEOUT_S:.0f} s: {self._tail()}"}
        if not self._result.exists():
            return {"error": f"exit code {code}: {self._tail()}"}
        return dict(json.loads(self._result.read_text()))

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-6:])


def _task(arm: Arm, **options: Any) -> Task:
    return Task(job=asdict(arm.job), result=str(Path(arm.job.cache) / "result.json"), **options)


def speed(arm: Arm, limit: int) -> dict[str, Any]:
    """Samples/s, samples per CPU-second and time to first batch."""
    with Child(arm, _task(arm, limit=limit, rates_only=True)) as child:
        found = child.result()
    if "seconds" in found:
        found["samples_per_s"] = found["window_samples"] / found["seconds"]
        found["samples_per_cpu_s"] = found["window_samples"] / max(found["cpu_seconds"], 0.01)
    elif "consumed" in found:
        found = {"error": f"the stream ended after {found['consumed']} of {limit} samples"}
    return found


def memory(arm: Arm, limit: int) -> dict[str, Any]:
    """Peak PSS of the process tree, bytes. Apart from `speed`, since taking it costs time."""
    with Child(arm, _task(arm, limit=limit)) as child:
        sampler = _PssSampler(child.process.pid)
        found = child.result()
        sampler.stop()
    return found | {"peak_pss": sampler.peak}


class _PssSampler:
    """Sums the proportional set sizes of a process tree ten times a second."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(pid,), daemon=True)
        self._thread.start()

    def _sample(self, pid: int) -> None:
        while not self._ended.wait(0.1):
            self.peak = max(self.peak, sum(pss_bytes(process) for process in descendants(pid)))

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process; 0 once it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * int(next((line.split()[1] for line in text.splitlines() if line.startswith("Pss:")), 0))


def order(arm: Arm) -> dict[str, Any]:
    """Shuffle quality of an epoch, and new processes that resume at 10, 50 and 90% of it."""
    cache = Path(arm.job.cache)
    n = arm.job.samples
    marks = [round(n * position) for position in POSITIONS]
    ids = cache / "epoch.ids"
    with Child(arm, _task(arm, limit=2 * n, ids=str(ids), marks=marks, states=str(cache))) as child:
        found = child.result()
    if "error" in found or "missing" in found:
        return found
    batches = read_ids(ids)
    found |= _quality(batches, n) | {"epoch": asdict(metrics.tally(batches, n)), "resumed": []}
    for mark in marks if arm.job.arm != "ceiling" else ():
        found["resumed"].append(_resume(arm, cache / f"{mark}.pkl", np.concatenate(batches)))
    return found


def _quality(batches: list[np.ndarray], samples: int) -> dict[str, float]:
    stream = np.concatenate(batches)
    return {
        "entropy": metrics.relative_entropy(stream),
        "shards_per_batch": metrics.shards_per_batch(batches, samples, SHARDS),
        "label_chi2": metrics.label_chi2(batches, labels(samples)),
    }


def _resume(arm: Arm, saved: Path, stream: np.ndarray) -> dict[str, Any]:
    """Continue from a state in a new process: seconds to the first batch, and what came twice or never.

    `stream` is what the process that saved the state consumed, at least up to there. Where a library has no state, the
    new process starts an epoch with another seed and takes as many samples as were left.
    """
    if not saved.exists():
        return {"error": f"no state was saved at {saved.stem}"}
    checkpoint = pickle.loads(saved.read_bytes())
    consumed, job = checkpoint["consumed"], arm.job
    stateless = checkpoint["state"] is None
    if stateless:
        arm = Arm(Job(**asdict(job) | {"seed": job.seed + 1}), arm.python)
    ids = saved.with_suffix(".ids")
    limit = job.samples - consumed if stateless else 2 * job.samples
    with Child(arm, _task(arm, limit=limit, ids=str(ids), resume=str(saved))) as child:
        found = child.result()
    batches = read_ids(ids)
    rest = np.concatenate([np.zeros(0, np.int64), *batches])
    tally = metrics.tally([stream[:consumed], rest], job.samples)
    return (
        found
        | asdict(tally)
        | {"at": consumed, "stateless": stateless, "continued": _continues(stream, rest, consumed)}
    )


def _continues(stream: np.ndarray, rest: np.ndarray, consumed: int) -> bool:
    """Whether the resumed stream goes on in the very order that the interrupted one had, as far as both are known."""
    known = min(len(stream) - consumed, len(rest))
    return bool(known > 0 and (stream[consumed : consumed + known] == rest[:known]).all())


def kill(arm: Arm, seed: int) -> dict[str, Any]:
    """SIGKILL in mid-epoch, then resume from the last state, saved twenty times an epoch.

    What the killed process consumed after that state is recomputed by the trainer; it counts neither as a duplicate
    nor as delivered.
    """
    cache, n = Path(arm.job.cache), arm.job.samples
    ids = cache / "killed.ids"
    target = round(n * random.Random(seed).uniform(0.3, 0.8))
    before = set(os.listdir("/dev/shm"))
    with Child(arm, _task(arm, limit=2 * n, ids=str(ids), every=max(1, n // 20), states=str(cache))) as child:
        while child.process.poll() is None and (ids.stat().st_size if ids.exists() else 0) < 8 * target:
            time.sleep(0.001)
        if child.process.poll() is not None:
            found = child.result()
            return found if "missing" in found or "error" in found else {"error": "it ended before it was killed"}
        group = descendants(child.process.pid)
        child.kill()
    left = [name for name in set(os.listdir("/dev/shm")) - before if _belongs(name, group)]
    found = _resume(arm, cache / "last.pkl", np.concatenate(read_ids(ids)))
    for name in left:  # counted; the machine is to be as it was
        Path("/dev/shm", name).unlink(missing_ok=True)
    return found | {"survivors": sum(_alive(pid) for pid in group), "shm_left": sorted(left), "killed_at": target}


def _belongs(name: str, group: list[int]) -> bool:
    """Shared memory of torch and Python carries the process's id; mosaicml-streaming counts from 000000_."""
    return bool(re.match(r"\d{6}_", name)) or any(str(pid) in re.findall(r"\d+", name) for pid in group)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def read_ids(path: Path) -> list[np.ndarray]:
    """Ids of each batch, in the order in which they were consumed."""
    values = np.fromfile(path, "<i8") if path.exists() else np.zeros(0, np.int64)
    batches, at = [], 0
    while at < len(values):
        batches.append(values[at + 1 : at + 1 + values[at]])
        at += 1 + int(values[at])
    return batches


MEASURES: Mapping[str, Any] = {"speed": speed, "memory": memory, "order": order, "kill": kill}
