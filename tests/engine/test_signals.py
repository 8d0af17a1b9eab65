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


def test_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    for name in ("SLURM_JOB_END_TIME", "TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.left() == float("inf"), "a process that nobody will kill"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with StopRequest() as stop:
        assert stop.left() == float("inf"), "nobody has asked"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.left() == 30.0
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
        assert stop.left() == 120.0
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1050")
    with StopRequest() as stop:
        assert stop.left() == 50.0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.left() == 50.0, "what ends first"


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
