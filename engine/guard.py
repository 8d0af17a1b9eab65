"""Whether a step is taken: not where the loss or the gradient is not finite, or far above what came before it.

The rule is that of OLMo-core's SkipStepOptimizer (https://github.com/allenai/OLMo-core): more than `sigma` standard
deviations above the mean of the last `window` steps that were taken; for the gradient's norm also five times that mean.
Every rank decides alike, for all are given the same all-reduced figures. Where `skips` steps on end were not taken, the
weights themselves are suspected: the run goes back to a checkpoint and steps over the samples since (PaLM,
https://arxiv.org/abs/2204.02311, section 5.1).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from millrace.core.config import option
from millrace.core.errors import UserError

_FIGURES = ("loss", "grad_norm")
_FAR = 5.0  # times the mean: nearer outliers of the gradient's norm are everyday in small batches, and clipped
RETURNS = 3  # to a checkpoint on end, with no full window between; after that the run stops


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Which steps are not taken."""

    sigma: float = option(6.0, "standard deviations above the mean at which a step is not taken; 0: whatever is finite")
    window: int = option(128, "steps that make the mean; nothing finite is judged before so many were taken")
    replicas: int = option(100, "steps between comparisons of the ranks' weights, beside each save (ZeRO 0); 0: never")
    skips: int = option(8, "steps not taken on end after which the run goes back to a checkpoint; 0: never")

    def __post_init__(self) -> None:
        for key, least in {"sigma": 0, "window": 2, "skips": 0, "replicas": 0}.items():
            if getattr(self, key) < least:
                raise UserError(f"guard.{key} = {getattr(self, key)}: give {least} or more")


class Guard:
    """Judges steps by their loss (per target) and the norm of their gradient.

    `taken` is the last step whose update is in the weights, `skipped` how many since were not taken, `returns` how
    often the run went back to a checkpoint before a whole window of steps was taken again.
    """

    def __init__(self, config: GuardConfig, state: Mapping[str, Any] | None = None) -> None:
        """`state` is what `state` gave, for a run that goes on."""
        self._config = config
        self.skipped = self.returns = self._calm = 0
        self._restore(state or {})

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.taken, self._stage = state.get("taken", 0), state.get("stage", 0)
        self._window = {name: deque[float](state.get(name, ()), self._config.window) for name in _FIGURES}
        self.skipped, self.returns, self._calm = (state.get(name, 0) for name in ("skipped", "returns", "calm"))

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; JSON keeps them to the last bit."""
        counts = {"taken": self.taken, "stage": self._stage, "skipped": self.skipped, "returns": self.returns}
        return counts | {"calm": self._calm} | {name: list(values) for name, values in self._window.items()}

    def judge(self, step: int, stage: int, loss: float, grad_norm: float) -> str:
        """Why `step` is not to be taken; empty where it is.

        `stage` is that of the data: another mixture or length has another loss, with which the window begins anew.
        """
        if stage != self._stage:
            self._stage = stage
            for values in self._window.values():
                values.clear()
        figures = dict(zip(_FIGURES, (loss, grad_norm), strict=True))
        why = next(filter(None, (self._fault(name, value) for name, value in figures.items())), "")
        if why:
            self.skipped, self._calm = self.skipped + 1, 0
            return why
        self.taken, self.skipped, self._calm = step, 0, self._calm + 1
        if self._calm >= self._config.window:
            self.returns = 0
        for name, value in figures.items():
            self._window[name].append(value)
        return ""

    def _fault(self, name: str, value: float) -> str:
        if not math.isfinite(value):
            return f"{name} is {value}"
        taken = self._window[name]
        if not self._config.sigma or len(taken) < self._config.window:
            return ""
        mean = sum(taken) / len(taken)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in taken) / len(taken))
        allowed = mean + self._config.sigma * deviation
        if value <= (max(allowed, _FAR * mean) if name == "grad_norm" else allowed):
            return ""
        return f"{name} {value:.4g} is more than {self._config.sigma:g} deviations ({deviation:.2g}) above {mean:.4g}"

    @property
    def lost(self) -> bool:
        """Whether so many steps on end were not taken that the run should go back."""
        return 0 < self._config.skips <= self.skipped

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Take over the `state` of the checkpoint that the run went back to."""
        returns, stage = self.returns + 1, self._stage
        self._restore(state)
        self.skipped, self._calm, self.returns = 0, 0, returns
        if self._stage != stage:  # the window is of other data than what comes now
            self._stage = -1
