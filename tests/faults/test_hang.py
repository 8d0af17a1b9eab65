"""Ranks that stand still, in whole runs: ended in time, the rank named, and continued to the same losses."""

from __future__ import annotations

import json
import signal
from typing import Any

import psutil
import pytest

from tests.faults.conftest import Run, Runs

SHORT = [f"watchdog.{section}=4 s" for section in ("step", "collective", "data")]
STEPS = ("train.duration=9 steps", "checkpoint.every=3 steps")


@pytest.fixture(scope="module")
def twin(config_file: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Runs(config_file, tmp_path_factory.mktemp("twin"))("twin", [], *STEPS)


FAULTS = {
    "stopped": {"kind": "signal", "at": "forward", "signal": "SIGSTOP"},
    "read": {"kind": "read"},
    "left out": {"kind": "sum"},
}
SAYS = {
    "stopped": "rank 1 on {host} is stopped by a signal or a debugger, in 'step' of step 5 for",
    "read": "rank 1 on {host} is in 'data' of step 5 for",
    "left out": "rank 1 on {host} left out a collective and is",
}


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=() if fault == "stopped" else pytest.mark.slow) for fault in FAULTS]
)
def test_a_hang_is_ended_named_and_continued(runs: Any, twin: Run, fault: str) -> None:
    import socket

    run = runs("run", [FAULTS[fault] | {"ranks": [1], "steps": [5]}], *STEPS, *SHORT)
    assert set(run.codes) <= {-signal.SIGKILL, 1} and -signal.SIGKILL in run.codes, run.said
    (hang,) = run.events("hang")
    assert hang["ranks"] == [1] and hang["step"] == 5
    assert SAYS[fault].format(host=socket.gethostname()) in hang["why"]
    assert hang["why"] in " ".join("".join(run.said).split())
    assert json.loads((run.path / "outcome.json").read_text())["code"] == 75
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(run.path) in " ".join(p.info["cmdline"] or ())]
    again = runs("run", [], *STEPS, *SHORT)
    assert again.codes == [0, 0] and again.losses() == twin.losses()
