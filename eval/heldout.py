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

    @property
    def per(self) -> Mapping[str, str]:
        """Figures that are given for each of what another one counts."""
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

    def weight(self, micro: Any) -> float:
        """What they weigh."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """`loss` in nats per target; `bpb` in bits per byte of text, which tokenizers can be compared by.

    `averages` are the objective's other measures (see `means`).
    """

    loss: float
    bpb: float
    tokens: int
    bytes: int
    averages: dict[str, float]


def means(sums: Mapping[str, float], per: Mapping[str, str], targets: float) -> dict[str, float]:
    """Figures for each target, or for each of what `per` names for them; those of nothing are left out."""
    counts = {name: sums[per[name]] if name in per else max(targets, 1.0) for name in sums if name not in per.values()}
    return {name: sums[name] / count for name, count in counts.items() if count}


@torch.no_grad()
def evaluate(objective: Measured, engines: Engines, batches: Iterable[tuple[Any, int]]) -> HeldOut:
    """The mean over all ranks' batches (micro-batch, bytes it covers); every rank must have as many.

    Figures of training alone, which `measure` does not give, are left out. Call it on every rank.
    """
    engines.train(False)
    names = {name: None for name in objective.figures if not name.startswith("max_")}.keys()
    sums, tokens, weight, size = dict.fromkeys(names, 0.0), 0, 0.0, 0
    left_out: set[str] = set()
    for micro, covered in batches:
        view = objective.view(micro)
        found = objective.measure(view, engines)
        sums = {name: have + float(found.get(name, 0.0)) for name, have in sums.items()}
        left_out |= names - found.keys()
        tokens += objective.targets(view)
        weight += objective.weight(view)
        size += covered
    engines.train()
    all_tokens, all_weight, all_bytes, *added = engines.world.sum(tokens, weight, size, *sums.values())
    sums = dict(zip(names, added, strict=True))
    averages, loss = means(sums, objective.per, all_tokens), sums["loss"]
    averages = {name: value for name, value in averages.items() if name != "loss" and name not in left_out}
    return HeldOut(
        loss=loss / (all_weight or 1.0),
        bpb=loss / math.log(2) / max(all_bytes, 1),
        tokens=int(all_tokens),
        bytes=int(all_bytes),
        averages=averages,
    )
