"""Activation checkpointing, compilation and z-loss on two ranks change what they should, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.conftest import close

CHECKPOINTING = "engine.activation_checkpointing=true"
COMPILE = "engine.compile=true"
Z_LOSS = "objective.z_loss=1e-3"


def job(name: str, *overrides: str, stage: int = 0) -> dict[str, Any]:
    return {"name": name, "overrides": [f"engine.zero_stage={stage}", *overrides], "steps": 4}


@pytest.fixture(scope="module")
def trained(scenarios: Any) -> dict[str, Any]:
    jobs = [job(f"plain {z}", stage=z) for z in (0, 2, 3)]
    jobs += [job(f"checkpointing {z}", CHECKPOINTING, stage=z) for z in (0, 2, 3)]
    jobs += [job(f"z-loss {z}", Z_LOSS, stage=z) for z in (0, 3)]
    jobs += [job("compiled 2", COMPILE, stage=2)]
    return dict(scenarios(2, jobs, timeout=400))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_activation_checkpointing_is_exact(trained: Any, stage: int) -> None:
    plain, other = trained[f"plain {stage}"], trained[f"checkpointing {stage}"]
    assert other["losses"] == plain["losses"]
    assert other["after"] == plain["after"], "weights and moments"


def test_compiled_trains_alike(trained: Any) -> None:
    plain, other = trained["plain 2"], trained["compiled 2"]
    assert other["spans"] == plain["spans"]
    assert close(plain["losses"], other["losses"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_compiled_with_checkpointing_trains_alike(trained: Any, scenarios: Any, stage: int) -> None:
    found = scenarios(2, [job("both", COMPILE, CHECKPOINTING, stage=stage)], timeout=400)
    assert close(trained[f"plain {stage}"]["losses"], found["both"]["losses"]) < 1e-5


def test_z_loss_is_the_same_on_one_rank_and_at_every_stage(trained: Any, scenarios: Any) -> None:
    alone = scenarios(1, [job("z-loss", Z_LOSS)])["z-loss"]["losses"]
    assert close(alone, trained["z-loss 0"]["losses"]) < 1e-6
    assert close(alone, trained["z-loss 3"]["losses"]) < 1e-6
    # What is reported is the likelihood alone: the first step's is that of a run without.
    assert trained["z-loss 0"]["losses"][0] == trained["plain 0"]["losses"][0]
    assert trained["z-loss 0"]["losses"][1:] != trained["plain 0"]["losses"][1:]
