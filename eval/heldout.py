"""Held-out loss of the model in training, per token and in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from millrace.engine.engines import Engines


class Measured(Protocol):
    """What is asked of an objective."""

    @property
    def figures(self) -> Sequence[str]:
        """Names of the figures."""
        ...

    def view(self, micro: Any) -> Any:
        """What it makes of a micro-batch."""
        ...

    def measure(self, micro: Any, engines: Engines) -> Mapping[str, torch.Tensor]:
        """Figures of a view, by name."""
        ...

    def targets(self, micro: Any) -> int:
        """Targets of a view."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """`loss` in nats per target; `bpb` in bits per byte of text, which tokenizers can be compared by.

    `averages` are the objective's other measures, for each target.
    """

    loss: float
    bpb: float
    tokens: int
    bytes: int
    averages: dict[str, float]


@torch.no_grad()
def evaluate(objective: Measured, engines: Engines, batches: Iterable[tuple[Any, int]]) -> HeldOut:
    """The mean over all ranks' batches (micro-batch, bytes it covers); every rank must have as many.

    Call it on every rank.
    """
    engines.train(False)
    names = [name for name in objective.figures if not name.startswith("max_")]
    sums, tokens, size = dict.fromkeys(names, 0.0), 0, 0
    for micro, covered in batches:
        view = objective.view(micro)
        found = objective.measure(view, engines)
        sums = {name: have + float(found[name]) for name, have in sums.items()}
        tokens += objective.targets(view)
        size += covered
    engines.train()
    all_tokens, all_bytes, *added = engines.world.sum(tokens, size, *sums.values())
    sums = dict(zip(names, added, strict=True))
    loss = sums.pop("loss")
    return HeldOut(
        loss=loss / max(all_tokens, 1),
        bpb=loss / math.log(2) / max(all_bytes, 1),
        tokens=int(all_tokens),
        bytes=int(all_bytes),
        averages={name: value / max(all_tokens, 1) for name, value in sums.items()},
    )
