"""SIGTERM, SIGINT, SIGUSR1 and a time limit ask a run to finish its step, save and end with "continue me"."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

_ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


GRACE = 120.0  # seconds before the time limit of a Slurm job, which every task of it finds in its environment
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds that torchrun gives its workers once it was signalled itself


class StopRequest:
    """A context in which these signals only set `name`; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.name = ""
        self._limit = float(os.environ.get("SLURM_JOB_END_TIME") or "inf")
        self._until = self._limit - min(GRACE, (self._limit - time.time()) / 4)
        self._asked = float("inf")
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        if not self.name and time.time() > self._until:
            self.name = "the job's time limit"
        return bool(self.name)

    def left(self) -> float:
        """Seconds until this process will be killed, as far as the launcher and Slurm say; otherwise infinite."""
        launcher = float(os.environ.get(SHUTDOWN, "30")) if "TORCHELASTIC_RUN_ID" in os.environ else float("inf")
        return min(self._limit, self._asked + launcher) - time.time()

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in _ASKED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        self._asked = min(self._asked, time.time())
