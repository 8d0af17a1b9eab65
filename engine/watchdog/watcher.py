"""The process beside a rank: `python -m millrace.engine.watchdog.watcher JOB` (JSON), started by `Watch`.

When its rank stands still for longer than its section may take, the watcher calls a hang: a folder in the run
directory, which all ranks' watchers look for. Each then writes there what its rank is at, with the stacks of all its
threads; the watcher of the lowest rank judges, writes the outcome "continue me", and all kill their ranks. Sections
with deadlines are also how NVIDIA's resiliency extension finds hangs (https://github.com/NVIDIA/nvidia-resiliency-ext).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from millrace.core.console import error
from millrace.core.errors import CONTINUE
from millrace.core.lease import holder
from millrace.core.ledger import Ledger
from millrace.core.rundir import RunDir, write_atomic
from millrace.engine.watchdog.heartbeat import Beat, read
from millrace.engine.watchdog.verdict import Seen, judge

_LOOKS = 1.0  # seconds; with more ranks fewer, so that the file system is asked some 200 times a second by all
_STACKS, _REPORTS, _VERDICT = 3.0, 15.0, 15.0  # seconds to wait for each


@dataclass(frozen=True)
class Job:
    """What a watcher needs to know; `pid` is the rank's process, `folder` its own, on its node."""

    pid: int
    folder: str
    run: str
    rank: int
    hosts: list[str]
    owner: int
    limits: dict[str, float]

    @property
    def hang(self) -> Path:
        """Where watchers meet; another start of the run has another."""
        return Path(self.run) / "hang" / f"{self.owner:08d}"


def watch(job: Job) -> None:
    """Look at the rank until it ends, or until it has to be ended."""
    beat_file, looked, slack, last = Path(job.folder) / "beat", time.monotonic(), 0.0, 0
    pause = max(_LOOKS, len(job.hosts) / 200)
    while not _ended(job, pause):
        now, beat = time.monotonic(), read(beat_file)
        # Where this process stood still itself, the job was suspended as a whole.
        slack = 0.0 if beat.begun != last else slack + max(0.0, now - looked - 5 * pause)
        looked, last = now, beat.begun
        if job.hang.is_dir() or now - beat.since - slack > job.limits[beat.section]:
            return end_run(job, beat)


def _ended(job: Job, seconds: float) -> bool:
    """Wait so long; whether the rank has ended, or has no more need of a watcher."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) or os.getppid() != job.pid


def end_run(job: Job, beat: Beat) -> None:
    """Meet the other watchers, let one of them judge, and kill the rank."""
    with contextlib.suppress(OSError):  # a file system that is away must not keep the rank alive
        job.hang.mkdir(parents=True, exist_ok=True)
        write_atomic(job.hang / f"rank-{job.rank:05d}.json", json.dumps(asdict(_look(job, beat)), indent=1))
        wait_for(lambda: len(_reports(job)) == len(job.hosts), _REPORTS)
        verdict = job.hang / "verdict.json"
        if job.rank == min(_reports(job)):
            _conclude(job, verdict)
        wait_for(verdict.exists, _VERDICT)
    if os.getppid() == job.pid:
        os.kill(job.pid, signal.SIGKILL)


def _look(job: Job, beat: Beat) -> Seen:
    state, stacks = _state(job.pid), Path(job.folder) / "stacks"
    if state not in "tTZX":
        os.kill(job.pid, signal.SIGUSR2)
        wait_for(lambda: stacks.read_text().count("\n") > 0, _STACKS)
        time.sleep(0.2)  # the rest of it
    return Seen(
        rank=job.rank,
        host=socket.gethostname(),
        section=beat.section,
        step=beat.step,
        begun=beat.begun,
        seconds=time.monotonic() - beat.since,
        state=state,
        stack=stacks.read_text(),
    )


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_for(what: Callable[[], bool], seconds: float) -> None:
    """Wait until `what` holds, for so long at most."""
    until = time.monotonic() + seconds
    while not what() and time.monotonic() < until:
        time.sleep(0.1)


def _reports(job: Job) -> dict[int, Path]:
    return {int(path.stem[5:]): path for path in job.hang.glob("rank-*.json")}


def _conclude(job: Job, verdict: Path) -> None:
    seen = {rank: Seen(**json.loads(path.read_text())) for rank, path in _reports(job).items()}
    ranks, why = judge(job.hosts, seen)
    step = min(s.step for s in seen.values())
    why = f"the run hung: {why}; stacks of all ranks are in {job.hang}"
    error(why)
    owner = holder(Path(job.run))
    if owner is not None and owner.number == job.owner:  # otherwise another process has taken the run over
        Ledger(RunDir(job.run).ledger, job.owner).append("hang", fsync=True, step=step, ranks=ranks, why=why)
        RunDir(job.run).write_outcome(CONTINUE, why, step)
    write_atomic(verdict, json.dumps({"ranks": ranks, "why": why}))


def main() -> None:
    """Read the job and watch the parent process."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):  # meant for the rank
        signal.signal(number, signal.SIG_IGN)
    job = Job(**json.loads(sys.argv[1]))
    try:
        watch(job)
    finally:
        shutil.rmtree(job.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
