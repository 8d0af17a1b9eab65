"""How long a run took to go on, by what it waited for."""

from __future__ import annotations

from typing import Any

import pytest

from millrace.eval.report.recovery import recoveries


def record(event: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": event, "time": time, **fields}


def ledger(**start: Any) -> list[dict[str, Any]]:
    """Killed at 130; another start that reads a checkpoint for 3 s."""
    first = [record("start", 110.0, began=100.0), record("step", 120.0, step=1), record("step", 130.0, step=2)]
    resume = record("resume", 188.0, step=1, again=1, seconds=3.0, rejected=[])
    return [*first, resume, record("start", 190.0, began=175.0, **start), record("step", 197.0, step=2)]


def test_a_killed_run_without_a_batch_script() -> None:
    (found,) = recoveries(ledger())
    assert (found.step, found.again, found.rejected) == (1, 1, [])
    assert found.why == "killed or lost: it recorded no end"
    assert found.seconds == {"down": 45.0, "init": 12.0, "load": 3.0, "first step": 7.0}
    assert sum(found.seconds.values()) == 197.0 - 130.0, "from the last step before to the first after"


def test_what_the_batch_script_noted() -> None:
    (found,) = recoveries(ledger(job_ended_before=141.0, job_began=165.0))
    parts = {"detect": 11.0, "requeue": 24.0, "init": 22.0, "load": 3.0, "first step": 7.0}
    assert found.seconds == parts and sum(parts.values()) == 67.0


@pytest.mark.parametrize("ended", [90.0, 170.0])
def test_a_note_of_another_restart_is_not_used(ended: float) -> None:
    """A lost node leaves none, and that of an earlier restart lies about."""
    (found,) = recoveries(ledger(job_ended_before=ended, job_began=165.0))
    assert found.seconds["down"] == 45.0 and "detect" not in found.seconds


def test_why_and_which() -> None:
    records = ledger()
    records.insert(3, record("hang", 150.0, step=3, why="rank 1 is in 'data'"))
    records += [record("end", 198.0, step=2, outcome=75, why="asked to stop by SIGUSR1")]
    records += [record("resume", 260.0, step=2, again=0), record("start", 261.0, began=250.0)]
    hang, stop = recoveries(records)
    assert hang.why == "rank 1 is in 'data'" and hang.seconds["down"] == 25.0
    assert stop.why == "asked to stop by SIGUSR1"
    assert stop.seconds == {"down": 52.0, "init": 11.0, "load": 0.0}, "it made no step yet"


def test_a_start_from_the_beginning_recovers_nothing() -> None:
    assert recoveries([]) == []
    assert recoveries([record("start", 1.0), record("step", 2.0, step=1), record("start", 9.0)]) == []
