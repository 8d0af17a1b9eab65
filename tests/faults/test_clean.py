"""Runs in which nothing is wrong: no detector says otherwise."""

from __future__ import annotations

from typing import Any

import pytest

TRIPS = ("skip", "rollback", "replicas", "straggler", "hang", "quarantine")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_clean_run_trips_nothing(runs: Any, seed: int) -> None:
    options = (f"run.seed={seed}", f"engine.zero_stage={seed % 4}", "train.duration=200 steps")
    run = runs("run", [], *options, "guard.replicas=5", "checkpoint.every=50 steps")
    assert run.codes == [0, 0], run.said
    assert [record for name in TRIPS for record in run.events(name)] == []
    assert not (run.path / "hang").exists() and len(run.events("step")) == 200
