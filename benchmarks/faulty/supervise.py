"""A batch system with requeue, and the faults: starts a job whenever it is over, for so many seconds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from faulty import damage, orders
from faulty.arms import Arm
from faulty.job import Job
from faulty.plan import Fault
from millrace.core.console import say

FAILURES = 3  # starts on end that took no step, after which the newest checkpoint is removed by hand
_LOOK, _SAVE = 0.02, 0.5  # seconds


class Tail:
    """The records that were added to a log, each as a line of JSON; lines that are not whole wait."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> list[dict[str, Any]]:
        """What is new since the last call."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # cut short by a kill
                found.append(json.loads(line))
        return found


@dataclass
class Start:
    """One start of the job. Times are seconds since the soak began; `first` is that of the first step."""

    number: int
    began: float
    newest: int | None  # checkpoint on the disk before it
    damaged: bool  # whether that one was torn or flipped
    resumed: int | None = None
    first: float | None = None
    last: float | None = None  # sign of life
    ended: float | None = None
    code: int | None = None
    hung: bool = False
    orphans: int = 0


@dataclass
class History:
    """What happened to an arm."""

    starts: list[Start] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    interventions: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    over: bool = False  # the run ended by itself
    until: float = 0.0  # unix time of the end


class Soak:
    """Runs one arm. `deadline` is how long a job may take no step before it is ended as hanging.

    The clock of the faults runs only while the job trains and has two checkpoints, so that each of them meets a job
    that trains, and one that damages the newest checkpoint leaves another.
    """

    def __init__(self, arm: Arm, faults: Iterator[Fault], seconds: float, deadline: float) -> None:
        self._arm, self._faults, self._deadline = arm, faults, deadline
        self._began, self._seconds = time.time(), seconds
        self._tail = Tail(arm.ledger)
        self.history = History()
        self._failures, self._damaged = 0, (0, 0)
        self._next, self._trained = next(faults), 0.0
        self._now: dict[str, Any] | None = None  # the fault under way
        self._taken: Path | None = None  # shows that a rank took an order

    def run(self) -> History:
        """All of it; nothing is left running."""
        self._arm.folder.mkdir(parents=True, exist_ok=True)
        while self._clock() < self._seconds and not self.history.over:
            self._one_start()
        self.history.seconds = self._clock()
        self.history.until = self._began + self._seconds
        return self.history

    def _clock(self) -> float:
        return time.time() - self._began

    def _one_start(self) -> None:
        number, newest = len(self.history.starts), damage.newest(self._arm.checkpoints)
        at = damage.number(newest) if newest else None
        start = Start(number, self._clock(), at, newest is not None and damage.identity(newest) == self._damaged)
        self.history.starts.append(start)
        log = self._arm.folder / f"start-{number:03d}.log"
        with Job(self._arm.command(), self._arm.environment(number), log) as job:
            self._follow(job, start)
            if self._clock() >= self._seconds:
                _stop(job, self._arm.grace)
        self._account(job, start)

    def _follow(self, job: Job, start: Start) -> None:
        """Until the launcher has ended or the time is over."""
        looked = self._clock()
        while job.launcher.poll() is None and (now := self._clock()) < self._seconds:
            self._read(start)
            if start.first is not None and self._now is None and damage.count(self._arm.checkpoints) > 1:
                self._trained += now - looked
                if self._trained >= self._next.after:
                    self._strike(job)
            looked = now
            self._order_taken(job)
            if now - max(start.began, start.last or 0.0) > self._deadline:
                start.hung = True
                job.kill()
            time.sleep(_LOOK)
        if job.launcher.poll() is not None:
            start.orphans = job.orphans()

    def _read(self, start: Start) -> None:
        for record in self._tail.read():
            if record["event"] == "start":
                start.resumed = record.get("resumed_from") or 0
            elif record["event"] == "step":
                start.last = self._clock()
                if start.first is None:
                    start.first = start.last
                    self._recovered(start)

    def _strike(self, job: Job) -> None:
        """Let the next fault happen."""
        fault, self._next, self._trained = self._next, next(self._faults), 0.0
        self._now = {**asdict(fault), "time": self._clock()}
        self.history.faults.append(self._now)
        say(f"{self._clock():7.1f} s, {self._arm.name}: fault {fault.number}, {fault.kind}")
        if fault.kind in ("kill rank", "stop"):
            number = signal.SIGKILL if fault.kind == "kill rank" else signal.SIGSTOP
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((self._arm.folder / f"rank-{fault.rank}.pid").read_text()), number)
        elif fault.kind == "preempt":
            _stop(job, self._arm.grace)
        elif fault.kind in ("nan", "kill in save"):
            rank = fault.rank if fault.kind == "nan" else 0
            self._taken = orders.give(self._arm.folder, rank, fault.kind)
        else:
            job.kill()
            if fault.kind != "kill job":
                self._now["damaged"] = self._damage(fault)

    def _damage(self, fault: Fault) -> str:
        checkpoint = damage.newest(self._arm.checkpoints)
        if checkpoint is None:
            return "there was no checkpoint"
        self._damaged = damage.identity(checkpoint)
        torn = fault.kind == "torn"
        done = damage.tear(checkpoint, fault.at) if torn else damage.flip(checkpoint, fault.at, fault.bit)
        return f"{checkpoint.name}: {done}"

    def _order_taken(self, job: Job) -> None:
        if self._now is None or self._taken is None or not self._taken.exists():
            return
        self._taken = None
        if self._now["kind"] == "nan":
            self._now = None
        else:
            time.sleep(_SAVE * self._now["at"])
            job.kill()

    def _recovered(self, start: Start) -> None:
        if self._now is not None and self._taken is None and start.began > self._now["time"]:
            self._now["recovered"] = self._clock()
            self._now = None

    def _account(self, job: Job, start: Start) -> None:
        """After the end of a start."""
        self._read(start)
        start.ended, start.code = self._clock(), job.launcher.returncode
        self.history.over = self._arm.over(job.began) and self._clock() < self._seconds
        self._failures = 0 if start.first is not None else self._failures + 1
        if self._failures >= FAILURES and not self.history.over:
            self._failures = 0
            self._intervene()

    def _intervene(self) -> None:
        checkpoint = damage.newest(self._arm.checkpoints)
        self.history.interventions.append({"time": self._clock(), "removed": checkpoint and checkpoint.name})
        say(f"{self._clock():7.1f} s, {self._arm.name}: by hand: {checkpoint} is removed")
        if checkpoint is not None:
            damage.remove(checkpoint)


def _stop(job: Job, grace: float) -> None:
    """SIGTERM to the launcher; what is left after the grace period is killed."""
    if job.launcher.poll() is None:
        job.launcher.send_signal(signal.SIGTERM)
    until = time.monotonic() + grace
    while job.launcher.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    if job.launcher.poll() is None:
        job.kill()
