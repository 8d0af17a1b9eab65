"""One start of an arm: a launcher and all that comes from it, found by a mark in the environment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import die_with_parent

_ENDS = 15.0  # seconds in which what a launcher leaves behind may end by itself
_VARIABLE = "SOAK_JOB"


class Job:
    """A launcher in a session of its own; leaving the block ends every process that came from it."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self._mark = f"{_VARIABLE}={uuid.uuid4().hex}"
        self.began = time.time()
        with open(log, "w") as file:
            self.launcher = subprocess.Popen(
                command, env={**env, _VARIABLE: self._mark.partition("=")[2]}, stdin=subprocess.DEVNULL,
                stdout=file, stderr=file, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def processes(self) -> list[int]:
        """Every process that came from the launcher, and the launcher; the dead are not among them."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if self._mark.encode() in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """SIGKILL to all; they are stopped first, so that none sees another die."""
        while alive := self.processes():
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            time.sleep(0.02)
        self.launcher.wait()

    def orphans(self) -> int:
        """After the end of the launcher: the number of processes that outlive it by 15 seconds; they are killed."""
        until = time.monotonic() + _ENDS
        while (alive := self.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        self.kill()
        return len(alive)
