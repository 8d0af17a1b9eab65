"""The demo's proof of exact resumption fails when anything differs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from millrace.core.errors import UserError
from millrace.launch.demo.twins import compare


def step(number: int) -> dict[str, Any]:
    samples = [[number, 0, 10], [number + 100, 4, 9]]
    return {"event": "step", "time": 0.0, "step": number, "loss_hex": (1.0 / number).hex(), "samples": samples}


UNKILLED = [step(n) for n in range(1, 7)]
RESUME = {"event": "resume", "time": 0.0, "step": 3}
# killed after step 5, resumed from 3
KILLED = [*(step(n) for n in range(1, 6)), RESUME, *(step(n) for n in range(4, 7))]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_equal_twins_pass(tmp_path: Path) -> None:
    proof = compare(write(tmp_path / "a", UNKILLED), write(tmp_path / "b", KILLED), 5)
    assert (proof.killed_at, proof.resumed_from, proof.steps, proof.samples) == (5, 3, 6, 12)


def changed(place: int, **fields: Any) -> list[dict[str, Any]]:
    records = copy.deepcopy(KILLED)
    records[place] |= fields
    return records


@pytest.mark.parametrize(
    ("killed", "says"),
    [
        (changed(8, loss_hex=(0.5 + 2**-53).hex()), "step 6 has loss_hex"),
        (changed(6, loss_hex=(0.25 + 2**-54).hex()), "step 4 has loss_hex"),
        (changed(7, samples=[[5, 0, 10], [105, 4, 8]]), "step 5 has samples"),
        (KILLED[:-1], r"lacks steps \[6\]"),
        ([r for r in KILLED if r is not RESUME], "did not resume"),
    ],
)
def test_any_difference_fails(tmp_path: Path, killed: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(UserError, match=says):
        compare(write(tmp_path / "a", UNKILLED), write(tmp_path / "b", killed), 5)
