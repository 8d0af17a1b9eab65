"""benchmarks/save_stall.py: what is counted as held up, and its arms on a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.house.typing_tree import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other as siblings

import save_arms
import save_stall


def rank(blocked: float, steps: list[float], flying: int) -> dict[str, Any]:
    save = {"blocked": blocked, "steps": steps, "flying": flying, "visible": blocked + sum(steps[:flying]), "bytes": 12}
    return {"saves": [save, {**save, "blocked": 9.0}], "rest": [1.0, 1.0, 5.0]}


def test_the_slowest_rank_and_only_the_steps_until_it_is_visible_count() -> None:
    rounds = [{"ranks": [rank(0.5, [1.5, 2.0, 7.0], 2), rank(0.25, [1.0, 1.0, 7.0], 2)]}]
    first, later = (save_stall.figures(rounds, which) for which in (True, False))
    assert first == {"blocked": [0.5], "extra": [1.5], "stall": [2.0], "visible": [4.0], "bytes": [12]}
    assert later["blocked"] == [9.0] and later["stall"] == [10.5]


def test_memory_sees_what_is_allocated_and_not_what_is_mapped() -> None:
    own, shared = save_arms._rss(1 << 22)
    assert (own, shared) == (0, 0)  # no such process
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import save_arms, os\n"
    script += "a = save_arms._rss(os.getpid())[0]; x = bytearray(os.urandom(1) * 2**26)\n"
    script += "print(save_arms._rss(os.getpid())[0] - a)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.9 < int(done.stdout) / 2**26 < 2.2


@pytest.mark.slow
@pytest.mark.parametrize("arm", list(save_arms.ARMS))
def test_an_arm_saves(arm: str, tmp_path: Path) -> None:
    import common

    decoupled = arm == "deepspeed-decoupled"
    ranks, stage = (1, 0) if decoupled else (2, 2)
    job = {"arm": arm, "size": "10M", "ranks": ranks, "stage": stage, "folder": str(tmp_path)}
    job |= {"warmup": 1, "rest": 1, "saves": 2, "after": 2}
    found = common.fresh(save_stall.__file__, job, ranks)
    assert "error" not in found, found["error"]
    per = found["ranks"][0]["saves"][-1]["bytes"] / found["parameters"]
    assert (16 if arm == "deepspeed" else 12) == pytest.approx(per, rel=0.02)
    assert all(len(r["saves"]) == 2 and s["flying"] >= 1 for r in found["ranks"] for s in r["saves"])
