"""Which rank is slower than the others: by its own forward passes, which nobody else holds up.

Under ZeRO 3 a forward pass waits for the others' weights, so that there all ranks look alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from millrace.engine.distributed import World

EVERY = 10  # steps between comparisons
ON_END = 3  # comparisons in which a rank is slow before it is named: other work on its node slows it for a moment
_SLOWER, _AT_LEAST = 1.25, 0.02  # times the typical rank's seconds, and seconds more than those


@dataclass(frozen=True)
class Straggler:
    """A rank and its node; its seconds in the forward passes of a step, and those of the typical rank."""

    rank: int
    host: str
    seconds: float
    typical: float


class Pace:
    """Measures this rank's forward passes and compares the ranks."""

    def __init__(self, world: World, hosts: Sequence[str]) -> None:
        self._world, self._hosts = world, hosts
        self._steps: list[float] = []
        self._now: list[Any] = []
        self._slow: dict[int, int] = {}  # rank → comparisons on end

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass."""
        began = _mark(self._world.device)
        yield
        self._now.append((began, _mark(self._world.device)))

    def step(self) -> list[Straggler]:
        """After each step, when the device has been waited for, on every rank: who was slow `ON_END` times on end."""
        self._steps.append(sum(_seconds(began, ended) for began, ended in self._now))
        self._now.clear()
        if len(self._steps) < EVERY:
            return []
        typical = statistics.median(self._steps)
        self._steps.clear()
        return self._lasting(stragglers(self._world.gather_objects(typical), self._hosts))

    def _lasting(self, found: list[Straggler]) -> list[Straggler]:
        self._slow = {slow.rank: self._slow.get(slow.rank, 0) % ON_END + 1 for slow in found}
        return [slow for slow in found if self._slow[slow.rank] == ON_END]


def stragglers(found: Sequence[float], hosts: Sequence[str]) -> list[Straggler]:
    """Of every rank's seconds, those that are far above the lower median."""
    typical = statistics.median_low(found)
    return [
        Straggler(rank, hosts[rank], seconds, typical)
        for rank, seconds in enumerate(found)
        if seconds > max(_SLOWER * typical, typical + _AT_LEAST)
    ]


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(began: Any, ended: Any) -> float:
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000
