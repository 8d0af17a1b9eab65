"""SIGTERM, SIGINT and SIGUSR1 ask a run to finish its step, save and end with "continue me"."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

_ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """A context in which these signals only set `name`; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.name)

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
