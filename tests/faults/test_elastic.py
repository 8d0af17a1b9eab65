"""A run that goes on with other ranks and at another ZeRO stage: the same state, samples and next five losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import close
from tests.engine.test_checkpoint_worlds import WAYS

# (ranks before, way before) → (ranks after, way after); the default persistence threshold but for "thr0"
MOVES = [
    ((4, "zero0"), (2, "zero1")), ((4, "zero1"), (2, "zero2")), ((4, "zero3"), (2, "zero0")),
    ((2, "zero2"), (4, "zero3")), ((2, "zero3-offload"), (4, "zero2-offload")), ((2, "zero0"), (4, "zero3-thr0")),
    ((4, "zero2"), (3, "zero3")), ((4, "zero3-thr0"), (3, "zero1")), ((4, "zero1-offload"), (3, "zero3-offload")),
    ((3, "zero3"), (1, "zero2")), ((3, "zero1"), (1, "zero0")), ((3, "zero2-offload"), (1, "zero3-thr0-offload")),
]  # fmt: skip
BATCH = "train.batch=12"  # what 1, 2, 3 and 4 ranks divide
BEFORE = sorted({before for before, _ in MOVES})


@pytest.fixture(scope="module")
def written(scenarios: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[tuple[int, str], Any], Path]:
    """Each of `BEFORE`: seven steps at a stretch, and two steps saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for world in (2, 3, 4):
        jobs = []
        for name in (name for ranks, name in BEFORE if ranks == world):
            overrides = [*WAYS[name], BATCH]
            jobs.append({"name": f"{name} whole", "overrides": overrides, "steps": 7})
            half = {"name": f"{name} half", "overrides": overrides, "steps": 2, "save": str(folder / f"{world}-{name}")}
            jobs.append(half)
        for name, result in scenarios(world, jobs, timeout=500).items():
            found[world, name] = result
    return found, folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("before, after", MOVES, ids=lambda place: f"{place[0]}-{place[1]}")
def test_other_ranks_and_another_stage(
    written: Any, scenarios: Any, before: tuple[int, str], after: tuple[int, str]
) -> None:
    (results, folder), (world, name) = written, before
    path = folder / f"{world}-{name}" / "step-00000002"
    job = {"name": "on", "overrides": [*WAYS[after[1]], BATCH], "steps": 5, "load": str(path)}
    rest = scenarios(after[0], [job], timeout=300)["on"]
    whole, half = results[world, f"{name} whole"], results[world, f"{name} half"]
    assert rest["loaded"] == half["after"]
    assert rest["spans"] == whole["spans"][2:] and len(rest["spans"]) == 5
    assert close(whole["losses"][2:], rest["losses"]) < 1e-6
