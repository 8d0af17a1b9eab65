"""A rank that is slower than the others is named, and goes on."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch

from millrace.engine.pace import EVERY, ON_END, Pace, stragglers


def test_only_who_is_far_above_the_typical_rank() -> None:
    even, hosts = [0.100, 0.104, 0.098, 0.121], ["n1", "n1", "n2", "n2"]
    assert stragglers(even, hosts) == [] and stragglers([0.001, 0.019], hosts) == []
    (slow,) = stragglers([*even[:3], 0.130], hosts)
    assert (slow.rank, slow.host, slow.seconds, slow.typical) == (3, "n2", 0.130, 0.100)
    assert [s.rank for s in stragglers([0.3, 0.1], hosts)] == [0]


class Told:
    """A world of two ranks whose second is slow in the comparisons that it is told."""

    device = torch.device("cpu")

    def __init__(self, slow: list[bool]) -> None:
        self.slow = iter(slow)

    def gather_objects(self, mine: float) -> list[float]:
        return [0.1, 0.3 if next(self.slow) else 0.1]


def test_a_moment_is_not_told_and_what_lasts_is_told_now_and_then() -> None:
    slow = [True, True, False, True, True, True, True, True, True, True]
    pace: Any = Pace(Told(slow), ["n1", "n2"])  # type: ignore[arg-type]
    told = [number for number in range(EVERY * len(slow)) if pace.step()]
    assert told == [EVERY * 6 - 1, EVERY * 9 - 1]


@pytest.mark.slow
def test_a_slow_rank_is_named_and_nobody_is_killed(runs: Any) -> None:
    last = EVERY * ON_END
    steps = list(range(1, last + 2))
    fault = {"kind": "slow", "ranks": [1], "steps": steps, "seconds": 0.05}  # four micro-batches a step: 200 ms
    run = runs("run", [fault], f"train.duration={last + 1} steps", "engine.zero_stage=1")
    assert run.codes == [0, 0], run.said
    (found,) = run.events("straggler")
    assert (found["step"], found["rank"], found["host"]) == (last, 1, socket.gethostname())
    assert found["seconds"] > found["typical"] + 0.15
    assert f"step {last}: rank 1 on {socket.gethostname()} takes" in " ".join(run.said[0].split())
