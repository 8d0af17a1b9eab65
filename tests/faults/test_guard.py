"""Losses that are not finite, or far too large, in whole runs: the same decision on all ranks, and nothing poisoned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from millrace.engine.checkpoint.read import Checkpoint
from tests.faults.conftest import Run

GUARD = ("guard.window=4", "guard.skips=3", "checkpoint.keep=0", "checkpoint.every=3 steps")


def guard_state(checkpoint: Path) -> dict[str, Any]:
    return dict(Checkpoint(checkpoint).json("trainer")["guard"])


ONE_RANKS_NAN = {"kind": "loss", "ranks": [1], "steps": [4, 5], "factor": "nan"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_one_ranks_nan_is_skipped_by_all(runs: Any, stage: int) -> None:
    check_skipped(runs("run", [ONE_RANKS_NAN], "train.duration=8 steps", f"engine.zero_stage={stage}", *GUARD))


@pytest.mark.slow
def test_ranks_that_decide_alone_are_found(runs: Any) -> None:
    """What the test above is worth: it fails where each rank judges its own loss."""
    faults = [ONE_RANKS_NAN, {"kind": "alone", "steps": list(range(1, 9))}]
    with pytest.raises(AssertionError):
        check_skipped(runs("run", faults, "train.duration=8 steps", "engine.zero_stage=0", *GUARD))


def check_skipped(run: Run) -> None:
    """The steps 4 and 5 were not taken by any rank, and no checkpoint is poisoned."""
    assert run.codes == [0, 0], run.said
    assert [(r["step"], r["why"]) for r in run.events("skip")] == [(4, "loss is nan"), (5, "loss is nan")]
    steps = run.events("step")
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert [r["step"] for r in steps if not math.isfinite(r["loss"])] == [4, 5]
    assert "step 4 was not taken: loss is nan" in run.said[0] and "not taken" not in run.said[1]
    assert [r["step"] for r in run.events("checkpoint")] == [3, 6, 8]
    for step in (3, 6, 8):
        state = guard_state(run.path / f"checkpoints/step-{step:08d}")
        assert (state["taken"], state["skipped"]) == (step, 0)
        assert all(map(math.isfinite, state["loss"] + state["grad_norm"]))


@pytest.mark.slow
def test_a_loss_a_hundred_times_too_large_is_not_taken(runs: Any) -> None:
    faults = [{"kind": "loss", "steps": [6], "factor": "100"}]
    run = runs("run", faults, "train.duration=8 steps", *GUARD)
    assert run.codes == [0, 0], run.said
    (skip,) = run.events("skip")
    assert skip["step"] == 6 and "is more than 6 deviations" in skip["why"]


@pytest.mark.slow
def test_a_run_of_them_goes_back_to_a_checkpoint_and_steps_over_the_samples(runs: Any, scenarios: Any) -> None:
    faults = [{"kind": "loss", "ranks": [0], "steps": [8, 9, 10], "factor": "inf"}]
    run = runs("run", faults, "train.duration=14 steps", "engine.zero_stage=1", *GUARD, "guard.sigma=0")
    assert run.codes == [0, 0], run.said
    assert [(r["step"], r["why"]) for r in run.events("skip")] == [(step, "loss is inf") for step in (8, 9, 10)]
    (back,) = run.events("rollback")
    assert (back["step"], back["to"]) == (10, 6)
    assert "3 steps on end were not taken, the last of them 10" in run.said[0]
    assert "are those of" in run.said[0] and "step-00000006" in run.said[0]
    # The reference: the weights of step 6, the samples from step 11 on.
    reference = {
        "name": "reference",
        "load": str(run.path / "checkpoints/step-00000006"),
        "loader_of": str(run.path / "checkpoints/step-00000009"),
        "overrides": ["engine.zero_stage=1"],
        "unseen": [0],
        "steps": 5,
    }
    expected = scenarios(2, [reference])["reference"]
    found = [record for record in run.events("step") if record["step"] > 10]
    assert [r["loss_hex"] for r in found] == expected["losses"]
    assert [[list(span) for span in r["samples"]] for r in found] == [
        [list(span) for span in spans] for spans in expected["spans"]
    ]
    assert guard_state(run.path / "checkpoints/step-00000014")["returns"] == 0  # a whole window since


@pytest.mark.slow
def test_goes_on_alike_when_killed_between(runs: Any) -> None:
    """The window, the count of skipped steps and what is in the weights are part of the checkpoint."""
    faults = [{"kind": "loss", "steps": [8, 9, 10], "factor": "inf"}]
    whole = runs("whole", faults, "train.duration=14 steps", *GUARD)
    runs("parts", faults, "train.duration=9 steps", *GUARD)  # ends between the second and the third
    parts = runs("parts", faults, "train.duration=14 steps", *GUARD)
    assert whole.codes == parts.codes == [0, 0]
    assert parts.losses() == whole.losses() and len(parts.events("rollback")) == len(whole.events("rollback")) == 1
    assert parts.events("rollback")[0]["to"] == whole.events("rollback")[0]["to"] == 6


@pytest.mark.slow
def test_stops_where_going_back_does_not_help(runs: Any) -> None:
    faults = [{"kind": "loss", "steps": list(range(5, 99)), "factor": "nan"}]
    run = runs("run", faults, "train.duration=99 steps", *GUARD)
    assert run.codes == [93, 93], run.said
    assert [r["to"] for r in run.events("rollback")] == [3]  # and nothing is older than step 3
    outcome = json.loads((run.path / "outcome.json").read_text())
    assert outcome["code"] == 93 and "no checkpoint is older than the last step taken, 3" in outcome["why"]


def test_stops_at_once_where_no_step_was_ever_taken(runs: Any) -> None:
    run = runs("run", [{"kind": "loss", "steps": list(range(1, 99)), "factor": "nan"}], *GUARD)
    assert run.codes == [93, 93] and len(run.events("skip")) == 3
    assert "no checkpoint is older than the last step taken, 0" in run.said[0]
