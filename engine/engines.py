"""The engines of one run, driven, judged and saved as one: an objective may train several modules at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from millrace.engine.checkpoint.joint import AnyAdapter, JointAdapter
from millrace.engine.engine import Engine


class Engines:
    """The engines of an objective by name, the main one first; all are stepped together, or none is."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = dict(engines)
        self.main = next(iter(self._engines.values()))
        self.world = self.main.world
        adapters = {name: engine.adapter for name, engine in self._engines.items()}
        self.adapter: AnyAdapter = self.main.adapter if len(adapters) == 1 else JointAdapter(adapters)

    def __getitem__(self, name: str) -> Engine:
        return self._engines[name]

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines.values())

    @property
    def zero_stage(self) -> int:
        """ZeRO's, of all engines."""
        return int(self.main.ds.zero_optimization_stage())

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Of all engines' modules, frozen ones too."""
        for engine in self:
            yield from engine.module.parameters()

    def compile(self) -> None:
        """Compile the forward of every engine's module."""
        for engine in self:
            engine.compile()

    def train(self, mode: bool = True) -> None:
        """Put all modules into training mode, or out of it."""
        for engine in self:
            engine.ds.train(mode)

    def gradient_square(self) -> torch.Tensor:
        """This rank's share of the squared L2 norm of all engines' gradients; see `Engine.gradient_square`."""
        squares = [engine.gradient_square() for engine in self]
        return squares[0] if len(squares) == 1 else torch.stack(squares).sum()

    def discard(self) -> None:
        """Forget all gradients since the last step; see `Engine.discard`."""
        for engine in self:
            engine.discard()

    def step(self, lr: float) -> None:
        """One optimiser step of every engine, at `lr` times the engine's own factor."""
        for engine in self:
            engine.step(lr)

    def norms(self, *, gradients: bool) -> dict[str, float]:
        """L2 norm by layer; see `Engine.norms`. Layers of other engines than the main one are `ENGINE.LAYER`."""
        found: dict[str, float] = {}
        for name, engine in self._engines.items():
            prefix = "" if engine is self.main else f"{name}."
            found |= {prefix + layer: norm for layer, norm in engine.norms(gradients=gradients).items()}
        return found
