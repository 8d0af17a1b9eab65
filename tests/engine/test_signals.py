"""What asks a run to stop."""

from __future__ import annotations

import os
import signal
import time

import pytest

from millrace.engine.signals import GRACE, StopRequest


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_sets_its_name_and_the_handlers_come_back(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop and stop.name == ""
        os.kill(os.getpid(), number)
        assert stop and stop.name == name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM", "the last one counts"
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts() -> None:
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("job", [10 * GRACE, 2 * GRACE])  # of a short job, a quarter is left for saving
def test_a_time_limit_that_comes(monkeypatch: pytest.MonkeyPatch, job: float) -> None:
    now = 1e9
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setenv("SLURM_JOB_END_TIME", f"{now + job:.0f}")
    with StopRequest() as stop:
        last = now + job - min(GRACE, job / 4)
        now = last
        assert not stop
        now = last + 1
        assert stop and stop.name == "the job's time limit"
