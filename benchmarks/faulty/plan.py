"""Which faults come when: drawn from a seed, alike for every arm."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = {
    "kill rank": "SIGKILL of one rank",
    "kill job": "SIGKILL of the whole job",
    "preempt": "SIGTERM to the launcher, and SIGKILL to what is left after the grace period",
    "kill in save": "SIGKILL of the whole job up to half a second after a save began",
    "torn": "SIGKILL of the whole job; a file of the newest checkpoint is cut off while it is down",
    "flipped": "SIGKILL of the whole job; one bit of the newest checkpoint is flipped while it is down",
    "nan": "the loss of one rank is NaN in one step",
    "stop": "SIGSTOP of one rank, which never goes on",
}


@dataclass(frozen=True)
class Fault:
    """What happens `after` so many seconds of training since the job recovered from the one before.

    `at`, from 0 to 1, says which byte of a checkpoint is hit, or which part of half a second after a save began.
    """

    number: int
    after: float
    kind: str
    rank: int
    at: float
    bit: int


def draw(seed: int, gap: tuple[float, float], ranks: int) -> Iterator[Fault]:
    """Faults without end; every kind once in each eight, in random order."""
    chance, number = random.Random(f"soak {seed}"), 0
    while True:
        for kind in chance.sample(list(KINDS), len(KINDS)):
            yield Fault(
                number=number,
                after=chance.uniform(*gap),
                kind=kind,
                rank=chance.randrange(ranks),
                at=chance.random(),
                bit=chance.randrange(8),
            )
            number += 1
