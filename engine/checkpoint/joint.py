"""The adapters of several engines as one, so that a checkpoint holds a run whole whatever it trains at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from millrace.engine.checkpoint.slices import Adapter, Held


class JointAdapter:
    """What a checkpoint needs of several engines. The first one's parameters keep their names, so that a run with an
    adversary reads like one without; those of the others are called `ENGINE|NAME`."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        (_, first), *others = adapters.items()
        self._parts = [("", first), *((f"{name}|", adapter) for name, adapter in others)]
        self.rank, self.world, self.zero_stage = first.rank, first.world, first.zero_stage
        self.replicated = first.replicated
        self.named = [(prefix + name, param) for prefix, part in self._parts for name, param in part.named]

    def modules(self) -> list[tuple[str, torch.nn.Module]]:
        """Modules and what stands before their tensors' names."""
        return [(prefix, module) for prefix, part in self._parts for _, module in part.modules()]

    def held(self) -> Iterator[Held]:
        """What this rank keeps."""
        for prefix, part in self._parts:
            yield from (replace(item, name=prefix + item.name) for item in part.held())

    def owned(self) -> Iterator[Held]:
        """What this rank writes."""
        for prefix, part in self._parts:
            yield from (replace(item, name=prefix + item.name) for item in part.owned())

    def push(self) -> None:
        """Copy the masters into the weights that the forward pass uses."""
        for _, part in self._parts:
            part.push()

    def state_tensors(self) -> list[str]:
        """Names of the optimisers' states; all engines have the same optimiser."""
        return self._parts[0][1].state_tensors()

    def allocate(self) -> None:
        """Create the moments, so that they can be loaded."""
        for _, part in self._parts:
            part.allocate()

    def step_count(self) -> int:
        """Optimiser steps taken: the engines step together."""
        counts = {part.step_count() for _, part in self._parts}
        assert len(counts) == 1, counts
        return counts.pop()

    def set_step_count(self, count: int) -> None:
        """Restore Adam's step in all."""
        for _, part in self._parts:
            part.set_step_count(count)


AnyAdapter = Adapter | JointAdapter
