"""Ranks that are killed or asked to stop, at every part of a step and of a save: continued to the same end."""

from __future__ import annotations

import re
import signal
from collections import Counter
from typing import Any

import pytest

from millrace.engine.checkpoint.read import list_checkpoints, open_newest, verdict
from tests.faults.conftest import Run, Runs

EVERY = 3
STEPS = ("train.duration=9 steps", f"checkpoint.every={EVERY} steps", "checkpoint.keep=0")
STAGES = (0, 2, 3)


@pytest.fixture(scope="module")
def twins(config_file: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted run of a stage."""
    runs, made = Runs(config_file, tmp_path_factory.mktemp("twins")), {}

    def twin(stage: int) -> Run:
        if stage not in made:
            made[stage] = runs(f"zero{stage}", [], *STEPS, f"engine.zero_stage={stage}")
            assert made[stage].codes == [0, 0], made[stage].said
        return made[stage]

    return twin


def samples(run: Run) -> Counter[tuple[int, ...]]:
    """What the steps that count consumed: of a step that was done again, the last time."""
    steps = {record["step"]: record["samples"] for record in run.events("step")}
    return Counter(tuple(span) for spans in steps.values() for span in spans)


def check_equal(run: Run, twin: Run) -> None:
    assert run.losses() == twin.losses()
    assert samples(run) == samples(twin)
    for path in list_checkpoints(run.path / "checkpoints"):
        assert not verdict(path)
    (mine, _), (other, _) = (open_newest(r.path / "checkpoints") for r in (run, twin))
    assert mine is not None and other is not None and mine.step == other.step == 9
    assert mine.digest() == other.digest()


def recomputed(run: Run) -> int:
    steps = [record["step"] for record in run.events("step")]
    return len(steps) - len(set(steps))


KILLS = [
    pytest.param(at, rank, stage, id=f"{at}-rank{rank}-zero{stage}")
    for at in ("forward", "all-reduce", "optimiser", "save", "commit")
    for rank in ((0,) if at == "commit" else (0, 1))
    for stage in STAGES
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("at, rank, stage", KILLS)
def test_a_rank_killed_anywhere_is_continued_to_the_same_end(
    runs: Any, twins: Any, at: str, rank: int, stage: int
) -> None:
    saving = at in ("save", "commit")
    fault = {"kind": "signal", "signal": "SIGKILL", "at": at, "ranks": [rank], "steps": [6, 7, 8] if saving else [5]}
    options = (*STEPS, f"engine.zero_stage={stage}", *(() if saving else ("checkpoint.background=false",)))
    run = runs("run", [fault], *options)
    assert run.codes[rank] == -signal.SIGKILL and run.codes[1 - rank] == 1, run.said
    lost = run.said[1 - rank].replace("\n", " ")
    assert "Traceback" not in lost and f"rank {1 - rank} on " in lost and "lost another rank in" in lost
    again = runs("run", [], *options)
    assert again.codes == [0, 0], again.said
    check_equal(again, twins(stage))
    assert recomputed(again) <= EVERY + (2 if saving else 0)  # a save that was under way counts for nothing


@pytest.mark.slow
def test_a_grace_too_short_for_a_save_falls_back_to_the_one_before(
    runs: Any, twins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save takes four seconds, the launcher gives two; rank 0 was not asked itself."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as under torchrun")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")
    faults = [{"kind": "disk", "seconds": 4}]
    faults += [{"kind": "signal", "signal": "SIGTERM", "at": "forward", "ranks": [1], "steps": [7]}]
    run = runs("run", faults, *STEPS, "engine.zero_stage=2")
    (end,) = run.events("end")
    assert run.codes == [0, 0] and end["outcome"] == 75, run.said  # as torchrun wants it
    assert re.search(r"with [012] s left, and a save takes \d+ s: the run goes on from step-00000003", end["why"])
    assert "goes on from step-00000003; a longer slurm.grace avoids that" in " ".join(run.said[0].split())
    monkeypatch.undo()
    again = runs("run", [], *STEPS, "engine.zero_stage=2")
    assert again.codes == [0, 0] and recomputed(again) == 4, again.said
    assert "the save of step 6 was cut off before it was whole" in " ".join(again.said[0].split())
    (resumed,) = again.events("resume")
    assert (resumed["step"], resumed["unfinished"], resumed["again"]) == (3, [6], 4) and resumed["seconds"] > 0
    check_equal(again, twins(2))


STOPS = [
    pytest.param(name, at, marks=() if (name, at) == ("SIGUSR1", "save") else
                 pytest.mark.slow, id=f"{name}-{at}")
    for name in ("SIGTERM", "SIGUSR1", "SIGINT")
    for at in ("forward", "save")
]  # fmt: skip


@pytest.mark.parametrize("name, at", STOPS)
def test_a_run_asked_to_stop_saves_and_repeats_nothing(runs: Any, twins: Any, name: str, at: str) -> None:
    fault = {"kind": "signal", "signal": name, "at": at, "ranks": [1], "steps": [6, 7, 8] if at == "save" else [5]}
    options = (*STEPS, "engine.zero_stage=2")
    run = runs("run", [fault], *options)
    assert run.codes == [75, 75], run.said
    assert "asked to stop by" in run.said[0]
    again = runs("run", [], *options)
    assert again.codes == [0, 0] and recomputed(again) == 0
    check_equal(again, twins(2))
