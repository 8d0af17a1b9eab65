"""Whether a step is taken: not where the loss or the gradient is not finite, or far above what came before it.

The rule is that of OLMo-core's SkipStepOptimizer (https://github.com/allenai/OLMo-core): more than `sigma` standard
deviations above the mean of the last `window` steps that were taken. Every rank decides alike, for all are given the
same all-reduced figures.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millrace.core.config import option
from millrace.core.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Which steps are not taken."""

    sigma: float = option(6.0, "standard deviations above the mean at which a step is not taken; 0: whatever is finite")
    window: int = option(128, "steps that make the mean; nothing is judged before so many were taken")
    skips: int = option(8, "steps not taken on end after which the run goes back to a checkpoint; 0: never")

    def __post_init__(self) -> None:
        if self.sigma < 0 or self.window < 2 or self.skips < 0:
            raise UserError(
                f"guard.sigma = {self.sigma}, guard.window = {self.window}, guard.skips = {self.skips}: give sigma and "
                "skips of 0 or more, and a window of at least 2"
            )


class Guard:
    """Judges steps by their loss (per target) and the norm of their gradient."""

    def __init__(self, config: GuardConfig, history: Mapping[str, Sequence[float]] | None = None) -> None:
        """`history` is what `history` gave, for a run that goes on."""
        self._config = config
        self._taken: dict[str, deque[float]] = {
            name: deque((history or {}).get(name, ()), config.window) for name in ("loss", "grad_norm")
        }
        self.skipped = 0  # steps on end that were not taken

    def judge(self, loss: float, grad_norm: float) -> str:
        """Why a step is not to be taken; empty where it is, which then belongs to the window."""
        figures = {"loss": loss, "grad_norm": grad_norm}
        why = next(filter(None, (self._fault(name, value) for name, value in figures.items())), "")
        self.skipped = self.skipped + 1 if why else 0
        if not why:
            for name, value in figures.items():
                self._taken[name].append(value)
        return why

    def _fault(self, name: str, value: float) -> str:
        if not math.isfinite(value):
            return f"{name} is {value}"
        taken = self._taken[name]
        if not self._config.sigma or len(taken) < self._config.window:
            return ""
        mean = sum(taken) / len(taken)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in taken) / len(taken))
        if value <= mean + self._config.sigma * deviation:
            return ""
        return f"{name} {value:.4g} is more than {self._config.sigma:g} deviations ({deviation:.2g}) above {mean:.4g}"

    @property
    def lost(self) -> bool:
        """Whether so many steps on end were not taken that the run should go back."""
        return 0 < self._config.skips <= self.skipped

    def history(self) -> dict[str, list[float]]:
        """The window, for a checkpoint; JSON keeps it to the last bit."""
        return {name: list(values) for name, values in self._taken.items()}

    def forget(self) -> dict[str, Any]:
        """Begin to count skipped steps anew, after going back; returns what is known of them."""
        skipped, self.skipped = self.skipped, 0
        return {"skipped": skipped}
