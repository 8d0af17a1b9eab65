"""Checkpoints across ZeRO stages and world sizes, against runs that were never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import close

# name -> overrides; every optimiser wrapper of DeepSpeed that an AdamW run can get
WAYS = {
    "zero0": ["engine.zero_stage=0"],
    "zero1": ["engine.zero_stage=1"],
    "zero2": ["engine.zero_stage=2"],
    "zero3": ["engine.zero_stage=3"],
    "zero3-thr0": ["engine.zero_stage=3", "engine.persistence_threshold=0"],
    "zero1-offload": ["engine.zero_stage=1", "engine.offload_optimizer=true"],
    "zero2-offload": ["engine.zero_stage=2", "engine.offload_optimizer=true"],
    "zero3-offload": ["engine.zero_stage=3", "engine.offload_optimizer=true"],
    "zero3-thr0-offload": [
        "engine.zero_stage=3",
        "engine.persistence_threshold=0",
        "engine.offload_optimizer=true",
    ],
    "zero3-offload-params": [
        "engine.zero_stage=3",
        "engine.persistence_threshold=0",
        "engine.offload_optimizer=true",
        "engine.offload_params=true",
    ],
    "zero0-bf16": ["engine.zero_stage=0", "engine.precision=bf16"],
    "zero1-bf16": ["engine.zero_stage=1", "engine.precision=bf16"],
    "zero2-bf16": ["engine.zero_stage=2", "engine.precision=bf16"],
    "zero3-bf16": ["engine.zero_stage=3", "engine.precision=bf16"],
    "zero1-autocast": ["engine.zero_stage=1", "engine.precision=autocast"],
    "zero3-autocast": ["engine.zero_stage=3", "engine.precision=autocast"],
}
FP32 = [w for w in WAYS if not w.endswith(("bf16", "autocast"))]


@pytest.fixture(scope="module")
def written(scenarios: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Every way on two ranks: seven steps at a stretch, and two steps saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    jobs = []
    for name, overrides in WAYS.items():
        jobs.append({"name": f"{name} whole", "overrides": overrides, "steps": 7, "digest": True})
        jobs.append({"name": f"{name} half", "overrides": overrides, "steps": 2, "save": str(folder / name)})
    return scenarios(2, jobs, timeout=400), folder


@pytest.fixture(scope="module")
def continued(written: tuple[dict[str, Any], Path], scenarios: Any) -> dict[str, Any]:
    """Every way continued on two ranks as it was."""
    _, folder = written
    jobs = [
        {"name": name, "overrides": o, "steps": 5, "load": str(folder / name / "step-00000002")}
        for name, o in WAYS.items()
    ]
    return scenarios(2, jobs, timeout=400)


def test_the_wrappers_are_all_covered(written: Any) -> None:
    found = {r["wrapper"] for r in written[0].values()}
    assert {
        "DeepSpeedZeroOptimizer",
        "DeepSpeedZeroOptimizer_Stage3",
        "FP16_UnfusedOptimizer",
        "BF16_Optimizer",
    } <= found
    assert len(found) == 5, found  # and the plain optimiser


@pytest.mark.parametrize("name", WAYS)
def test_continued_is_bit_equal(written: Any, continued: Any, name: str) -> None:
    whole, half, rest = written[0][f"{name} whole"], written[0][f"{name} half"], continued[name]
    assert half["losses"] + rest["losses"] == whole["losses"]
    assert half["spans"] + rest["spans"] == whole["spans"]
    assert rest["loaded"] == half["after"]
    assert rest["after"] == whole["after"]


@pytest.mark.parametrize("name", FP32)
def test_stages_train_alike(written: Any, name: str) -> None:
    reference, other = written[0]["zero0 whole"], written[0][f"{name} whole"]
    assert other["loaded"] == reference["loaded"], "first weights differ"
    assert other["spans"] == reference["spans"]
    assert close(reference["losses"], other["losses"]) < 1e-6


@pytest.mark.parametrize("name", WAYS)
def test_the_norm_is_that_of_the_layers_and_of_deepspeed(written: Any, name: str) -> None:
    """DeepSpeed's own, taken while it steps, where it takes one."""
    result = written[0][f"{name} whole"]
    for total, by_layers, *deepspeed in result["norms"]:
        assert by_layers == pytest.approx(total, rel=1e-5)
        assert deepspeed == [pytest.approx(total, rel=2e-3 if "bf16" in name else 1e-5)] or name == "zero0"


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_other_worlds_and_stages(written: Any, scenarios: Any, world: int) -> None:
    """Two ranks' checkpoints on one and four ranks, and at another stage: order, digest, next five losses."""
    results, folder = written
    moves = [("zero0", "zero3-thr0"), ("zero1", "zero0"), ("zero2", "zero2"), ("zero3", "zero1"), ("zero3", "zero3"),
             ("zero2-offload", "zero3-offload"), ("zero3-thr0", "zero2")]  # fmt: skip
    jobs = [
        {"name": f"{a} {b}", "overrides": WAYS[b], "steps": 5, "load": str(folder / a / "step-00000002")}
        for a, b in moves
    ]
    found = scenarios(world, jobs, timeout=400)
    for a, b in moves:
        whole, half, rest = results[f"{a} whole"], results[f"{a} half"], found[f"{a} {b}"]
        assert rest["loaded"] == half["after"], (a, b)
        assert rest["spans"] == whole["spans"][2:], (a, b)
        assert close(whole["losses"][2:], rest["losses"]) < 1e-6, (a, b)
