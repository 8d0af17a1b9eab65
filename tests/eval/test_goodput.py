"""Where a run's time went."""

from __future__ import annotations

from typing import Any

import pytest

from millrace.eval.report.goodput import CAUSES, goodput


def record(event: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": event, "time": time, **fields}


def step(number: int, time: float, seconds: float = 2.0, wait: float = 0.0) -> dict[str, Any]:
    return record("step", time, step=number, seconds=seconds, data_wait=wait)


def test_every_second_of_an_interrupted_run_has_its_cause() -> None:
    """10 s to start, a first step of 7 s, steps of 2 s; killed after step 5; down 30 s; from step 3 again."""
    first = [record("start", 108.0, began=100.0, resumed_from=None)]
    first += [step(1, 117.0, 7.0), step(2, 119.0), step(3, 121.0)]
    first += [record("checkpoint", 122.0, step=3, seconds=5.0, stall=1.0), step(4, 124.0), step(5, 126.0, wait=0.5)]
    second = [record("resume", 163.0, step=3), record("start", 164.0, began=156.0, resumed_from=3)]
    second += [step(4, 169.0, 4.0), step(5, 171.0), record("eval", 174.0, step=5, seconds=3.0), step(6, 176.0)]
    second += [record("end", 177.0, step=6, outcome=0)]
    found = goodput(first + second)
    assert found is not None
    assert found.seconds == pytest.approx(
        {
            "training": 2.0 * 6,  # steps 1 to 6
            "data": 0.5,
            "save": 1.0,
            "eval": 3.0,
            "start": 10.0 + 9.0,
            "first": 5.0 + 2.0,
            "again": 2.0 + 1.5,  # steps 4 and 5, the first time
            "skipped": 0.0,
            "down": 30.0,
            "other": 1.0,  # from the last step to the end
        }
    )
    assert found.total == pytest.approx(77.0) and found.share == pytest.approx(12 / 77)
    assert list(found.seconds) == list(CAUSES)


def test_steps_that_were_not_taken_or_undone_do_not_count() -> None:
    records = [record("start", 10.0, began=10.0, resumed_from=None)]
    records += [step(n, 10.0 + 2 * n) for n in range(1, 9)]
    records.insert(6, record("skip", 22.0, step=5, why="loss is nan"))  # after step 5
    records.append(record("rollback", 26.0, step=8, to=6))
    records.append(step(9, 28.0))
    found = goodput(records)
    assert found is not None
    assert found.seconds["skipped"] == pytest.approx(2.0 * 3)  # 5, and 7 and 8
    assert found.seconds["training"] == pytest.approx(2.0 * 6) and found.share == pytest.approx(12 / 18)


def test_old_ledgers_and_empty_ones() -> None:
    assert goodput([]) is None and goodput([record("note", 1.0)]) is None
    only = goodput([record("start", 5.0)])
    assert only is not None and only.total == 0.0 and only.share == 0.0
    old = [record("start", 5.0), step(1, 8.0, 2.0), step(2, 10.0, 2.0), record("checkpoint", 11.0, step=2, seconds=1.0)]
    found = goodput(old)
    assert found is not None
    assert (found.seconds["start"], found.seconds["training"], found.seconds["save"]) == (1.0, 4.0, 1.0)
