"""A bit that flips in one rank's weights, where every rank holds them all."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from millrace.engine.checkpoint.read import list_checkpoints
from millrace.engine.replicas import name_odd

OPTIONS = ("train.duration=10 steps", "checkpoint.every=4 steps", "engine.zero_stage=0", "train.batch=6",
           "guard.replicas=3", "checkpoint.keep=0")  # fmt: skip


def test_three_ranks_name_the_one_that_differs_and_two_only_say_so() -> None:
    hosts = ["n1", "n1", "n2", "n3"]
    assert name_odd(["a"] * 4, hosts) == ""
    assert name_odd(["a", "a", "b"], hosts).startswith("the weights or moments of rank 2 on n2 differ")
    assert "rank 0 on n1, rank 3 on n3 differ" in name_odd(["b", "a", "a", "c", "a"], [*hosts, "n3"])
    assert "none of them has a majority" in name_odd(["a", "b"], hosts)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_a_flipped_bit_is_found_before_it_is_saved(runs: Any, world: int) -> None:
    fault = {"kind": "flip", "ranks": [world - 1], "steps": [5], "bit": 3}
    run = runs("run", [fault], *OPTIONS, world=world)
    assert run.codes == [75] * world, run.said
    (found,) = run.events("replicas")
    assert found["step"] == 6, "steps 5 and 6 are of one interval of three"
    named = f"rank 2 on {socket.gethostname()} differ" if world == 3 else "none of them has a majority"
    assert named in found["why"] and named in " ".join(run.said[0].split())
    assert [int(path.name[5:]) for path in list_checkpoints(run.path / "checkpoints")] == [4]
    again, twin = runs("run", [], *OPTIONS, world=world), runs("twin", [], *OPTIONS, world=world)
    assert again.codes == twin.codes == [0] * world and again.losses() == twin.losses()
